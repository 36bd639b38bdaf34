"""One spelling per thing: drop what tracing left behind, raise patterns into single ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from panguq.errors import TraceError
from panguq.ir.call_arguments import arguments, operand
from panguq.ir.edit import (
    assign_labels,
    call,
    erase_unused,
    finish,
    get_tensor,
    module_path,
    op_name,
    replace,
    retarget,
    tensor_node,
)
from panguq.ir.exported_graph import WHAT_TO_DO
from panguq.ir.node_meta import annotate
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.ir.ops import experts as expert_ops  # noqa: F401
from panguq.ir.ops.opset import is_allowed
from panguq.ir.plain_names import weight_name
from panguq.ir.run.interpret import ensure_finite
from panguq.ir.views import ExpertLinear
from panguq.passes.patterns.gated import to_gated_activation
from panguq.passes.patterns.matching import is_call, pair, type_of
from panguq.passes.patterns.norms import (
    offset_layer_norm,
    rounded_norm,
    scaled_norm,
    torch_rms_norm,
)
from panguq.passes.patterns.rotary import to_rotary
from panguq.passes.patterns.written_slices import concatenation
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Property, Table

aten = torch.ops.aten
panguq = torch.ops.panguq

Rewrite = Callable[[fx.Node], fx.Node | None]


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Before: the ATen ops of a trace.  After: the same function in canonical ops.

    - Casts to the same dtype, full slices, copies, dropout, products with 1 and assertions go;
      `view` and `_unsafe_view` become `reshape`; sizes are read from the graph's inputs.
    - A tensor made empty and filled slice by slice becomes a concatenation.
    - `addmm` and `mm` with a stored weight `[k, n]`, and `matmul` with the transpose of one of
      `[n, k]`, become `linear` with weight `[n, k]`.
    - A weight `[experts, k, n]` of an `expert_linear`, transposed as it is read, becomes one of
      `[experts, n, k]`, and so does one of `[experts * n, k]`; each such matmul has its weight's
      name as its module's.
    - `weight * (x * rsqrt(mean(x^2) + eps))`, also with `1 + weight`, becomes `panguq.rms_norm`;
      the same of `x - mean(x)` becomes `layer_norm`; `layer_norm` with the weight `1 + weight`
      becomes `panguq.layer_norm`.
    - `x * cos + concat(-x2, x1) * sin` becomes `panguq.rotary`, also where neighbours are turned
      instead of halves.
    - `silu(gate) * up` becomes `panguq.swiglu`, `gelu(gate) * up` `panguq.geglu`.
    - `scaled_dot_product_attention`, with the repeated key and value heads of grouped
      attention, becomes `panguq.attention`.
    """

    name: ClassVar[str] = "canonicalize"
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.CANONICAL})
    exact: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        counts: Counter[str] = Counter()
        for target, rewrite in _REWRITES:
            for node in list(gm.graph.nodes):
                if node.op == "call_function" and node.target is target and not _gone(node):
                    replacement = rewrite(node)
                    if replacement is not None:
                        counts[f"{op_name(node)} -> {op_name(replacement)}"] += 1
                        replace(node, replacement)
        _read_sizes_from_inputs(gm)
        for node in reversed(list(gm.graph.nodes)):
            if node.op == "call_function" and not node.users:
                erase_unused([node])
        for node in list(gm.graph.nodes):
            if node.op == "get_attr" and not node.users:
                gm.graph.erase_node(node)
        _check_ops(gm)
        _check_weights(gm)
        assign_labels(gm)
        finish(gm)
        result = PassResult(changed=sum(counts.values()))
        rows = tuple((key, number) for key, number in sorted(counts.items()))
        result.tables["rewrites"] = Table(("rewrite", "count"), rows)
        return result


def _check_ops(gm: fx.GraphModule) -> None:
    """Raises TraceError for ops of the model that no graph may contain, and says where they are."""
    where: dict[str, list[str]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and not is_allowed(node.target):
            paths = where.setdefault(str(node.target), [])
            if module_path(node) not in paths:
                paths.append(module_path(node))
    if where:
        calls = "; ".join(f"{op} in {_modules(paths)}" for op, paths in where.items())
        raise TraceError(f"the model calls what panguq does not know: {calls}", WHAT_TO_DO)


def _modules(paths: list[str]) -> str:
    """`module layers.0.mlp and 11 more`."""
    first = f"module {paths[0]}" if paths[0] else "the model's own forward"
    return f"{first} and {len(paths) - 1} more" if len(paths) > 1 else first


_READERS = (
    aten.linear.default, aten.embedding.default, aten.layer_norm.default,
    panguq.expert_linear.default, panguq.layer_norm.default, panguq.rms_norm.default,
)  # fmt: skip


def _check_weights(gm: fx.GraphModule) -> None:
    """Raises NumericsError for a weight with NaN or Inf. Other constants, such as masks, may."""
    for node in gm.graph.nodes:
        read = any(user.target in _READERS for user in node.users)
        if node.op == "get_attr" and read:
            tensor = get_tensor(gm, str(node.target))
            if not isinstance(tensor, FakeTensor):
                ensure_finite(str(node.target), tensor)


def _gone(node: fx.Node) -> bool:
    return bool(getattr(node, "_erased", False))


# --- what tracing leaves behind -------------------------------------------------------------


def _same_value(node: fx.Node) -> fx.Node:
    return operand(node, 0)


def _cast_to_same_dtype(node: fx.Node) -> fx.Node | None:
    source = operand(node, 0)
    return source if type_of(node) == type_of(source) else None


def _full_slice(node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    end = given["end"]
    to_the_end = end is None or (isinstance(end, int) and end >= 2**62)
    whole = given["start"] in (0, None) and to_the_end and given["step"] == 1
    return operand(node, 0) if whole else None


def _times_one(node: fx.Node) -> fx.Node | None:
    left, right = pair(node)
    if not isinstance(right, (int, float)) or right != 1.0 or type_of(node) != type_of(left):
        return None
    return left


def _dropout(node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    return _same_value(node) if given["p"] == 0 or not given["train"] else None


def _erase_assertion(node: fx.Node) -> None:
    node.graph.erase_node(node)


def _view_as_reshape(node: fx.Node) -> None:
    retarget(node, aten.reshape.default)


def _and_as_bitwise_and(node: fx.Node) -> None:
    retarget(node, aten.bitwise_and.Tensor)


def _read_sizes_from_inputs(gm: fx.GraphModule) -> None:
    """Let every dynamic size be read from the first input that has it."""
    first: dict[Any, tuple[fx.Node, int]] = {}
    for p in gm.graph.nodes:
        if p.op == "placeholder":
            for d, size in enumerate(p.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    first.setdefault(size.node.expr, (p, d))
    readers: dict[Any, fx.Node] = {}
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1:]
    for node in list(gm.graph.nodes):
        if node.target is aten.sym_size.int and isinstance(node.meta["val"], torch.SymInt):
            expr = node.meta["val"].node.expr
            if expr not in first:
                continue
            if expr not in readers:
                source, dim = first[expr]
                with gm.graph.inserting_after(last[0]):
                    readers[expr] = gm.graph.call_function(aten.sym_size.int, (source, dim))
                readers[expr].meta["val"] = node.meta["val"]
                last = [readers[expr]]
            replace(node, readers[expr])


# --- matmuls with a stored weight -----------------------------------------------------------


def _linear(node: fx.Node, x: Any, weight: Any, bias: Any) -> fx.Node | None:
    if weight.op != "get_attr" or len(weight.meta["val"].shape) != 2:
        return None
    if bias is not None and (bias.op != "get_attr" or len(bias.meta["val"].shape) != 1):
        return None
    gm = node.graph.owning_module
    assert gm is not None
    transposed = get_tensor(gm, str(weight.target)).t()
    stored = tensor_node(node, f"{weight.target}_t", transposed)
    return call(node, aten.linear.default, (x, stored, bias), origin=node)


def _addmm(node: fx.Node) -> fx.Node | None:
    bias, x, weight = (operand(node, position) for position in range(3))
    return None if node.kwargs else _linear(node, x, weight, bias)


def _mm(node: fx.Node) -> fx.Node | None:
    x, weight = operand(node, 0), operand(node, 1)
    if _turns(weight) and operand(weight, 0).op == "get_attr":  # x @ weight.T, as in Falcon
        return call(node, aten.linear.default, (x, operand(weight, 0), None), origin=node)
    return _linear(node, x, weight, None)


def _turns(node: fx.Node) -> bool:
    """Whether this is a matrix's transpose."""
    if node.op != "call_function" or len(node.meta["val"].shape) != 2:
        return False
    given = arguments(node) if is_call(node, aten.permute.default, aten.transpose.int) else {}
    swapped = {given.get("dim0"), given.get("dim1")} in ({0, 1}, {-1, -2})
    return swapped or given.get("dims") in ([1, 0], [-1, 0], [-1, -2]) or node.target in _TURNS


_TURNS = (aten.t.default, aten.numpy_T.default)


def _expert_linear(node: fx.Node) -> fx.Node | None:
    """The matmuls of all experts, reading a weight `[experts, n, k]` that is stored as such."""
    read = ExpertLinear.of(node)
    source, turned, stacked = read.weight, False, False
    if is_call(source, aten.transpose.int):
        source, turned = operand(source, 0), True
    if is_call(source, aten.reshape.default) and operand(source, 0).op == "get_attr":
        source, stacked = operand(source, 0), True
    if (turned or stacked) and source.op == "get_attr":
        gm = node.graph.owning_module
        assert gm is not None
        experts, n, k = read.weight.meta["val"].shape
        stored = get_tensor(gm, str(source.target))
        weight = stored.view(experts, *((k, n) if turned else (n, k)))
        weight = weight.transpose(1, 2) if turned else weight
        suffix = "_t" if turned else "_stacked"
        read.read_weight(tensor_node(node, f"{source.target}{suffix}", weight))
    if source.op == "get_attr":
        annotate(node, module_path=str(source.target))
    return None


# --- attention --------------------------------------------------------------------------------


def _repeats(node: Any) -> int:
    """How often each key or value head was repeated to give `node`; 1 if it was not."""
    if is_call(node, aten.repeat_interleave.self_int) and arguments(node)["dim"] == 1:
        return int(arguments(node)["repeats"])
    if is_call(node, aten.reshape.default) and is_call(operand(node, 0), aten.expand.default):
        expanded = operand(node, 0)
        source = operand(expanded, 0)
        if len(arguments(expanded)["size"]) == 5 and is_call(source, aten.unsqueeze.default):
            heads = operand(source, 0).meta["val"].shape[1]
            repeats = expanded.meta["val"].shape[2]
            whole = node.meta["val"].shape[1] == heads * repeats
            return int(repeats) if arguments(source)["dim"] == 2 and whole else 1
    return 1


def _unrepeated(node: Any, groups: int) -> Any:
    """The key or value whose heads were repeated `groups` times to give `node`, or None."""
    if _repeats(node) != groups:
        return None
    if is_call(node, aten.repeat_interleave.self_int):
        return operand(node, 0)
    unsqueezed = operand(operand(node, 0), 0)  # behind the reshape and the expand
    return operand(unsqueezed, 0)


def _attention(node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    q, k = query.meta["val"], key.meta["val"]
    if given["dropout_p"] != 0.0 or q.dim() != 4:
        return None
    scale = given["scale"]
    if scale is None and isinstance(q.shape[3], int):
        scale = q.shape[3] ** -0.5
    if not isinstance(scale, float):  # it follows from a dynamic size
        return None
    if mask is None and given["is_causal"]:
        if q.shape[2] != k.shape[2]:
            return None
        name = weight_name(f"{module_path(node) or 'attention'}.causal_mask", ())
        mask = tensor_node(node, name, torch.empty(0, dtype=torch.bool))
    groups = _repeats(key)
    if groups > 1:
        key, value = _unrepeated(key, groups), _unrepeated(value, groups)
        if key is None or value is None:
            return None
    return call(node, panguq.attention.default, (query, key, value, mask, scale), origin=node)


_REWRITES: list[tuple[Any, Rewrite]] = [
    (aten._assert_tensor_metadata.default, _erase_assertion),
    (aten._assert_scalar.default, _erase_assertion),
    (aten.lift_fresh_copy.default, _same_value),
    (aten.detach.default, _same_value),
    (aten.detach_.default, _same_value),
    (aten.alias.default, _same_value),
    (aten.contiguous.default, _same_value),
    (aten.clone.default, _same_value),
    (aten.dropout.default, _dropout),
    (aten.to.dtype, _cast_to_same_dtype),
    (aten.to.device, _cast_to_same_dtype),
    (aten.to.dtype_layout, _cast_to_same_dtype),
    (aten._to_copy.default, _cast_to_same_dtype),
    (aten.type_as.default, _cast_to_same_dtype),
    (aten.slice.Tensor, _full_slice),
    (aten.mul.Tensor, _times_one),
    (aten.view.default, _view_as_reshape),
    (aten._unsafe_view.default, _view_as_reshape),
    (aten.__and__.Tensor, _and_as_bitwise_and),
    (aten.slice_scatter.default, concatenation),
    (aten.addmm.default, _addmm),
    (aten.mm.default, _mm),
    (aten.matmul.default, _mm),
    (panguq.expert_linear.default, _expert_linear),
    (aten.mul.Tensor, scaled_norm),
    (aten.to.dtype, rounded_norm),
    (aten._to_copy.default, rounded_norm),
    (aten.type_as.default, rounded_norm),
    (aten.rms_norm.default, torch_rms_norm),
    (aten.layer_norm.default, offset_layer_norm),
    (aten.add.Tensor, to_rotary),
    (aten.mul.Tensor, to_gated_activation),
    (aten.scaled_dot_product_attention.default, _attention),
]
