"""The ops a panguq graph may contain, and how panguq's own ones are defined.

An op of panguq is a schema, a body and a fake. The body is the op's meaning: it runs on any
device PyTorch knows, so that every graph at every stage runs on a plain CPU. The fake gives
shape, dtype and strides of the result without computing it.

Files name ops as text (`aten.mm.default`); `resolve` maps such a name to the op and to nothing
else: what is not listed here cannot be reached from a file.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

Body = Callable[..., Any]

# What the dispatcher runs for tensors of a device that an extension adds, as torch_npu does.
DEVICE = "PrivateUse1"

_libraries: dict[str, torch.library.Library] = {}
_own_ops: dict[str, OpOverload] = {}
_bodies: dict[OpOverload, Body] = {}


def define_op(
    schema: str,
    fake: Body,
    namespace: str = "panguq",
    check: Body | None = None,
    npu: Body | None = None,
) -> Callable[[Body], OpOverload]:
    """Declare an op; the decorated function becomes its body and the name its OpOverload.

    `schema` is PyTorch's, without a namespace: `"swiglu(Tensor gate, Tensor up) -> Tensor"`. It and
    the body have the whole signature; the others name those of the arguments that they read.
    `fake` returns empty tensors of the right shape, dtype and strides, for inputs in any layout:
    torch.compile plans memory by them. `check` raises for a call that breaks the op's contract,
    before the body, the fake and `npu`, which is what runs for tensors on an NPU.
    """
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    arguments = torch._C.parse_schema(f"{namespace}::{schema}").arguments
    checked = None if check is None else by_name(check, arguments)

    def after_check(function: Body) -> Body:
        named = by_name(function, arguments)
        if checked is None:
            return named

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            checked(*args, **kwargs)
            return named(*args, **kwargs)

        return run

    def register(body: Body) -> OpOverload:
        name = schema.split("(", 1)[0]
        library.define(schema)
        library.impl(name, after_check(body), "CompositeExplicitAutograd")
        if npu is not None:
            library.impl(name, after_check(npu), DEVICE)
        torch.library.register_fake(f"{namespace}::{name}", after_check(fake), lib=library)
        op: OpOverload = getattr(getattr(torch.ops, namespace), name).default
        _bodies[op] = body
        return admit(op)

    return register


def bind(arguments: list[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of an op by name, as this call gives it or by default.

    Raises TypeError for a call that does not fit the schema.
    """
    positional = [a.name for a in arguments if not a.kwarg_only]
    if len(args) > len(positional):
        raise TypeError(f"{len(args)} positional arguments given, {len(positional)} taken")
    given = dict(zip(positional, args, strict=False))
    names = {a.name for a in arguments}
    for name in kwargs:
        if name not in names or name in given:
            raise TypeError(f"{'unknown' if name not in names else 'doubled'} argument {name!r}")
    given |= kwargs
    for argument in arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise TypeError(f"missing a required argument: {argument.name!r}")
            given[argument.name] = argument.default_value
    return given


def read_by(function: Body, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an op's arguments that `function` names; all of them if it takes `**rest`."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(given)
    return {name: given[name] for name in parameters}


def by_name(function: Body, arguments: list[Any]) -> Body:
    """`function`, to be called with all of an op's `arguments`, of which it gets those it names."""
    names = [argument.name for argument in arguments if not argument.has_default_value()]
    if len(names) == len(arguments) and list(inspect.signature(function).parameters) == names:
        return function

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        return function(**read_by(function, bind(arguments, args, kwargs)))

    return named


def body_of(target: Callable[..., Any]) -> Callable[..., Any]:
    """The function to call for a gradient: an op of `define_op`'s is opaque to autograd, its body
    is not. Any other call target is returned as it is."""
    return _bodies.get(target, target)  # type: ignore[call-overload]


def admit(op: OpOverload) -> OpOverload:
    """Let graphs and files name an op that another library defined. It must run on a CPU."""
    _own_ops[str(op)] = op
    return op


# Pure functions of their arguments: nothing in place, uninitialized, or on files; nothing random
# but dropout and its like, which traces contain switched off.
_ATEN = """
    _assert_scalar.default _assert_tensor_metadata.default _log_softmax.default _softmax.default
    _to_copy.default _unsafe_view.default abs.default add.Scalar add.Tensor addmm.default
    alias.default all.default all.dim amax.default amin.default any.default any.dim arange.default
    arange.start arange.start_step argmax.default baddbmm.default bitwise_and.Scalar
    bitwise_and.Tensor bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor bmm.default
    broadcast_to.default cat.default chunk.default clamp.default clamp.Tensor clamp_max.default
    clamp_min.default clone.default constant_pad_nd.default contiguous.default cos.default
    cumsum.default detach.default diff.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode
    dropout.default einsum.default elu.default embedding.default eq.Scalar eq.Tensor erf.default
    exp.default expand.default expand_as.default fill.Scalar fill.Tensor flatten.using_ints
    flip.default floor.default floor_divide.default full.default full_like.default gather.default
    ge.Scalar ge.Tensor gelu.default gt.Scalar gt.Tensor hardswish.default index.Tensor
    index_select.default le.Scalar le.Tensor leaky_relu.default lift_fresh_copy.default
    linear.default log.default log_softmax.int logical_and.default logical_not.default
    logical_or.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor matmul.default
    max.default maximum.default mean.default mean.dim minimum.default mm.default movedim.int
    mul.Scalar mul.Tensor narrow.default native_layer_norm.default layer_norm.default ne.Scalar
    ne.Tensor neg.default new_full.default new_ones.default new_zeros.default ones.default
    ones_like.default outer.default pad.default permute.default pow.Scalar pow.Tensor_Scalar
    pow.Tensor_Tensor reciprocal.default relu.default relu6.default remainder.Scalar
    remainder.Tensor repeat.default repeat_interleave.self_int reshape.default rms_norm.default
    roll.default round.default rsqrt.default rsub.Scalar rsub.Tensor scalar_tensor.default
    scaled_dot_product_attention.default select.int select_scatter.default sigmoid.default
    sign.default silu.default sin.default slice.Tensor slice_scatter.default softmax.int
    softplus.default split.Tensor split.sizes split_with_sizes.default sqrt.default squeeze.default
    squeeze.dim squeeze.dims stack.default sub.Scalar sub.Tensor sum.default sum.dim_IntList
    sym_size.int t.default tanh.default tile.default to.device to.dtype to.dtype_layout
    transpose.int tril.default triu.default type_as.default unbind.int unflatten.int
    unsqueeze.default view.default view_as.default where.ScalarOther where.ScalarSelf where.Scalar
    where.self zeros.default zeros_like.default
"""

# Items of an op with several results, and arithmetic on sizes.
_PYTHON: dict[str, Callable[..., Any]] = {
    "operator.getitem": operator.getitem,
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.truediv": operator.truediv,
    "operator.mod": operator.mod,
    "operator.neg": operator.neg,
    "operator.eq": operator.eq,
    "operator.ne": operator.ne,
    "operator.lt": operator.lt,
    "operator.le": operator.le,
    "operator.gt": operator.gt,
    "operator.ge": operator.ge,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_float": torch.sym_float,
    "torch.sym_not": torch.sym_not,
}


@functools.cache
def _fixed_ops() -> dict[str, Callable[..., Any]]:
    """The listed ops by name, without those that this torch release does not have."""
    ops = dict(_PYTHON)
    for entry in _ATEN.split():
        name, overload = entry.split(".")
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None and overload in packet.overloads():
            ops[f"aten.{entry}"] = getattr(packet, overload)
    return ops


@functools.cache
def _fixed_names() -> dict[Callable[..., Any], str]:
    return {op: name for name, op in _fixed_ops().items()}


def resolve(name: str) -> Callable[..., Any] | None:
    """The op that a file calls `name`; None for anything that is not allowed.

    An op of panguq is known once the module that defines it has been imported.
    """
    return _own_ops.get(name) or _fixed_ops().get(name)


def name_of(target: object) -> str | None:
    """The name under which `resolve` gives back this call target; None if there is none."""
    if isinstance(target, OpOverload) and _own_ops.get(str(target)) is target:
        return str(target)
    return _fixed_names().get(target) if callable(target) else None


def is_allowed(target: object) -> bool:
    """Whether a graph may call this target: exactly what a file can name."""
    return name_of(target) is not None


def allowed_ops() -> tuple[str, ...]:
    """The names of all ops that `resolve` knows, sorted."""
    return tuple(sorted({*_own_ops, *_fixed_ops()}))
