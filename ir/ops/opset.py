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
    names = _names_read(function)
    return dict(given) if names is None else {name: given[name] for name in names}


@functools.cache
def _names_read(function: Body) -> tuple[str, ...] | None:
    """The names of a function's arguments; None if it takes `**rest`."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return tuple(parameters)


def by_name(function: Body, arguments: list[Any]) -> Body:
    """`function`, to be called with all of an op's `arguments`, of which it gets those it names."""
    if _has_signature(function, arguments):
        return function

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        return function(**read_by(function, bind(arguments, args, kwargs)))

    return named


def _has_signature(function: Body, arguments: list[Any]) -> bool:
    """Whether a function has an op's very arguments and defaults, and may be called as the op is:
    binding them by name would cost small calls as much as their work."""
    parameters = inspect.signature(function).parameters
    return list(parameters) == [argument.name for argument in arguments] and all(
        parameters[argument.name].default == argument.default_value
        for argument in arguments
        if argument.has_default_value()
    )


def body_of(target: Callable[..., Any]) -> Callable[..., Any]:
    """The function to call for a gradient: an op of `define_op`'s is opaque to autograd, its body
    is not. Any other call target is returned as it is."""
    return _bodies.get(target, target)  # type: ignore[call-overload]


def admit(op: OpOverload) -> OpOverload:
    """Let graphs and files name an op that another library defined. It must run on a CPU."""
    _own_ops[str(op)] = op
    return op


# Pure functions of their arguments: nothing in place, uninitialized, or on files, and nothing that
# reads memory by strides from a file (`as_strided`) or by sizes that it does not check
# (`native_group_norm`); nothing random but dropout and its like, which traces contain switched off.
_ATEN = """
    abs.default acos.default acosh.default adaptive_avg_pool1d.default
    _adaptive_avg_pool2d.default add.Scalar add.Tensor addcdiv.default addcmul.default
    addmm.default alias.default all.default all.dim amax.default amin.default
    aminmax.default angle.default any.default any.dim any.dims arange.default arange.start
    arange.start_step argmax.default argmin.default argsort.default argsort.stable asin.default
    asinh.default _assert_scalar.default _assert_tensor_metadata.default atan.default
    atan2.default atanh.default avg_pool1d.default avg_pool2d.default avg_pool3d.default
    baddbmm.default batch_norm.default bilinear.default bitwise_and.Scalar bitwise_and.Tensor
    bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_not.default
    bitwise_or.Scalar bitwise_or.Tensor bitwise_right_shift.Tensor
    bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar bitwise_xor.Tensor bmm.default
    broadcast_to.default bucketize.Tensor cat.default ceil.default celu.default chunk.default
    clamp.default clamp.Tensor clamp_max.default clamp_min.default clip.default clone.default
    complex.default concat.default concatenate.default constant_pad_nd.default
    contiguous.default conv1d.default conv1d.padding conv2d.default conv2d.padding
    conv3d.default conv_transpose1d.default conv_transpose2d.input copysign.Tensor
    cos.default cosh.default count_nonzero.dim_IntList cummax.default cumprod.default cumsum.default
    deg2rad.default detach.default diag_embed.default diagonal.default diff.default div.Scalar
    div.Scalar_mode div.Tensor div.Tensor_mode dropout.default einsum.default
    elu.default embedding.default eq.Scalar eq.Tensor erf.default erfc.default erfinv.default
    exp.default exp2.default expand.default expand_as.default expm1.default
    fft_fft.default fft_ifft.default
    fft_irfft.default fft_rfft.default fill.Scalar fill.Tensor flatten.using_ints flip.default
    floor.default floor_divide.default fmod.Scalar fmod.Tensor frac.default full.default
    full_like.default gather.default ge.Scalar ge.Tensor gelu.default glu.default
    group_norm.default gru.input gru_cell.default gt.Scalar gt.Tensor hardshrink.default
    hardsigmoid.default hardswish.default hardtanh.default heaviside.default hstack.default
    hypot.default imag.default index.Tensor index_add.default index_copy.default
    index_fill.int_Scalar index_put.default index_select.default instance_norm.default
    isfinite.default isinf.default isnan.default kthvalue.default layer_norm.default le.Scalar
    le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor lift_fresh_copy.default
    linalg_cross.default linalg_matrix_exp.default linalg_vector_norm.default linear.default
    log.default log10.default log1p.default log2.default log_sigmoid.default
    _log_softmax.default log_softmax.int logaddexp.default logical_and.default
    logical_not.default logical_or.default logical_xor.default logsumexp.default lstm.input
    lstm_cell.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor
    masked_scatter.default matmul.default max.default max.dim max_pool1d.default
    max_pool2d.default maximum.default mean.default mean.dim median.dim meshgrid.indexing
    min.default min.dim minimum.default mish.default mm.default moveaxis.int movedim.int
    mul.Scalar mul.Tensor nan_to_num.default narrow.default native_layer_norm.default
    ne.Scalar ne.Tensor neg.default new_full.default new_ones.default new_zeros.default
    norm.ScalarOpt_dim one_hot.default ones.default ones_like.default outer.default pad.default
    permute.default pixel_shuffle.default pixel_unshuffle.default polar.default pow.Scalar
    pow.Tensor_Scalar pow.Tensor_Tensor prelu.default prod.default prod.dim_int real.default
    reciprocal.default reflection_pad1d.default reflection_pad2d.default relu.default
    relu6.default remainder.Scalar remainder.Tensor repeat.default repeat_interleave.self_int
    replication_pad1d.default replication_pad2d.default reshape.default rms_norm.default
    rnn_relu.input rnn_relu_cell.default rnn_tanh.input rnn_tanh_cell.default roll.default
    round.default rsqrt.default rsub.Scalar rsub.Tensor scalar_tensor.default
    scaled_dot_product_attention.default scatter.src scatter.value scatter_add.default
    scatter_reduce.two searchsorted.Tensor select.int select_scatter.default selu.default
    sgn.default sigmoid.default sign.default silu.default sin.default sinh.default slice.Tensor
    slice_scatter.default _softmax.default softmax.int softplus.default softshrink.default
    sort.default sort.stable split.sizes split.Tensor split_with_sizes.default sqrt.default
    square.default squeeze.default squeeze.dim squeeze.dims stack.default std.correction std.dim
    sub.Scalar sub.Tensor sum.default sum.dim_IntList swapaxes.default swapdims.default
    sym_size.int t.default take_along_dim.default tan.default tanh.default tensor_split.sections
    threshold.default tile.default to.device to.dtype to.dtype_layout _to_copy.default
    topk.default trace.default transpose.int tril.default tril_indices.default triu.default
    triu_indices.default trunc.default type_as.default unbind.int unflatten.int unfold.default
    _unsafe_view.default unsqueeze.default upsample_bilinear2d.vec upsample_linear1d.vec
    upsample_nearest1d.vec upsample_nearest2d.vec var.correction var.dim var_mean.correction
    view.default view_as.default view_as_complex.default view_as_real.default vstack.default
    where.Scalar where.ScalarOther where.ScalarSelf where.self xlogy.Tensor zeros.default
    zeros_like.default
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
