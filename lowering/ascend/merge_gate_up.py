"""Make one matmul of a gated MLP's gate and up projections."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from panguq.ir.canonical_views import gated_activation
from panguq.ir.edit import (
    call,
    free_name,
    get_tensor,
    label,
    merge,
    module_path,
    tensor_node,
)
from panguq.ir.node_meta import annotate, meta_of
from panguq.ir.ops import packing, quantize  # noqa: F401  (register the ops matched here)
from panguq.ir.properties import Property
from panguq.ir.views import Linear
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Region

aten = torch.ops.aten
panguq = torch.ops.panguq

_GATED = (panguq.swiglu.default, panguq.geglu.default)


@dataclass(frozen=True)
class MergeGateUp(Pass):
    """Before: `swiglu(linear(x, w_gate, b_gate), linear(x, w_up, b_up))`.

    After: `y = linear(x, cat(w_gate, w_up), cat(b_gate, b_up))` `[..., 2 f]` and
    `swiglu(y[..., :f], y[..., f:])`, for weights `[f, k]`.

    A row of the weight is one output, so codes, scales, zero points and biases are stacked row by
    row and every output keeps its own numbers. A missing bias counts as zeros. The two
    slices carry the labels of the matmuls whose results they are. Found by data flow: both
    matmuls read one node under one scheme, only the swiglu reads them, and both together have at
    most `largest_n` outputs if they are quantized. `npu_swiglu` takes its
    gate from the first half of one tensor (op-plugin docs), which is what this prepares; `geglu`
    and `npu_geglu` likewise.
    """

    name: ClassVar[str] = "merge-gate-up"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.SCHEMES})
    exact: ClassVar[bool] = True
    largest_n: int = ATLAS_A2.largest_dimension

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """Integer codes, if the recipe quantizes at all."""
        quantizes = any(isinstance(p, AssignSchemes) and p.quantizes for p in earlier)
        return self.requires | ({Property.WEIGHT_CODES} if quantizes else set())

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        readers = Counter(str(n.target) for n in gm.graph.nodes if n.op == "get_attr")
        nodes = [n for n in gm.graph.nodes if n.target in _GATED]
        for done, node in enumerate(nodes):
            ctx.progress("merge gate and up", done, len(nodes))
            gate, up = gated_activation(node).gate, gated_activation(node).up
            reason = _obstacle(gate, up, node, readers, self.largest_n)
            if reason is not None:
                result.skip(node, reason)
                continue
            result.sites.append(Region((label(Linear.of(gate).input),), (label(node),)))
            _merge(gm, ctx, node)
            result.changed += 1
        ctx.progress("merge gate and up", len(nodes), len(nodes))
        return result


def _obstacle(
    gate: fx.Node, up: fx.Node, gated: fx.Node, readers: Counter[str], largest_n: int
) -> str | None:
    """Why these two cannot become one matmul; None if they can."""
    for name, node in (("gate", gate), ("up", up)):
        if Linear.match(node) is None:
            return f"{name} is {label(node)}, not a matmul"
        if set(node.users) != {gated}:
            return f"{name} {label(node)} has other readers"
    if gate is up:
        return "gate and up are one matmul"
    one, other = Linear(gate), Linear(up)
    if one.input is not other.input:
        return f"gate reads {label(one.input)}, up reads {label(other.input)}"
    schemes = meta_of(gate).scheme, meta_of(up).scheme
    if schemes[0] != schemes[1]:
        names = " and ".join("none" if s is None else s.name for s in schemes)
        return f"their schemes differ: {names}"
    sizes = [linear.shape[0] for linear in (one, other)]
    if schemes[0] is not None and not schemes[0].is_float and sum(sizes) > largest_n:
        return f"{sum(sizes)} outputs are more than the {largest_n} of a quantized matmul"
    reason = _unlike(one.weight, other.weight)
    if reason is not None:
        return reason
    biases = [b for b in (one.bias, other.bias) if b is not None]
    if len({b.meta["val"].dtype for b in biases}) > 1:
        return "their biases differ in dtype"
    stored = [n for linear in (one, other) for n in _weight_tensors(linear)]
    if any(n.op != "get_attr" for n in stored):
        return "a weight is computed, not stored"
    shared = [str(n.target) for n in stored if len(n.users) > 1 or readers[str(n.target)] > 1]
    if shared:
        return f"{shared[0]} has other readers, so that merging would store it twice"
    return None


def _unlike(gate: Any, up: Any) -> str | None:
    """Why the weights' expressions cannot be stacked: they must be the same ops and constants."""
    if gate.op != up.op or (gate.op == "call_function" and gate.target is not up.target):
        return f"their weights are made differently: {label(gate)} and {label(up)}"
    if gate.op == "get_attr":
        one, other = gate.meta["val"], up.meta["val"]
        if one.dtype != other.dtype or one.shape[1:] != other.shape[1:]:
            return f"{label(gate)} and {label(up)} differ in dtype or shape"
        return None
    if gate.target not in (panguq.dequantize_weight.default, panguq.unpack_int4.default):
        return f"{label(gate)} is not known to keep the rows of a weight apart"
    if len(gate.users) > 1 or len(up.users) > 1:
        return f"{label(gate if len(gate.users) > 1 else up)} has other readers"
    for one, other in zip(gate.args, up.args, strict=True):
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            reason = _unlike(one, other)
            if reason is not None:
                return reason
        elif one is not other and one != other:
            return f"{label(gate)} and {label(up)} differ: {one} and {other}"
    return None


def _weight_tensors(linear: Linear) -> list[fx.Node]:
    """The leaves below the linear's weight, and its bias."""
    leaves: list[fx.Node] = []
    stack = [linear.weight, *([linear.bias] if linear.bias is not None else [])]
    while stack:
        node = stack.pop()
        if node.all_input_nodes:
            stack.extend(node.all_input_nodes)
        else:
            leaves.append(node)
    return leaves


def _merge(gm: fx.GraphModule, ctx: PassContext, gated: fx.Node) -> None:
    gate, up = gated_activation(gated).gate, gated_activation(gated).up
    one, other = Linear.of(gate), Linear.of(up)
    stem = _common_stem(gate, up)
    weight = _stack(gm, ctx, gated, gate, (one.weight, other.weight), stem)
    args: tuple[Any, ...] = (one.input, weight)
    sizes = [linear.shape[0] for linear in (one, other)]
    if one.bias is not None or other.bias is not None:
        parts = [_bias_values(gm, one, other), _bias_values(gm, other, one)]
        name = free_name(gm, f"{stem}.bias")
        args = (*args, tensor_node(gated, name, ctx.store.put(torch.cat(parts))))
    merged = call(gated, aten.linear.default, args, origin=gate, suffix=".gate_up")
    annotate(merged, module_path=stem)
    n = sizes[0]
    halves = [(gate, 0, n), (up, n, n + sizes[1])]
    results = [
        call(gated, aten.slice.Tensor, (merged, -1, start, end), origin=linear)
        for linear, start, end in halves
    ]
    merge((gate, up), merged, results)


def _common_stem(gate: fx.Node, up: fx.Node) -> str:
    """The module that holds both, with the name under which servers know the merged weight."""
    parts = zip(module_path(gate).split("."), module_path(up).split("."), strict=False)
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parts)]
    return ".".join([*shared, "gate_up_proj"]).lstrip(".")


def _stack(
    gm: fx.GraphModule,
    ctx: PassContext,
    before: fx.Node,
    origin: fx.Node,
    pair: tuple[Any, Any],
    stem: str,
) -> fx.Node:
    """The weight expression of both over stacked stored tensors."""
    gate, up = pair
    if gate.op == "get_attr":
        parts = [get_tensor(gm, str(n.target)) for n in pair]
        name = free_name(gm, f"{stem}.{str(gate.target).rpartition('.')[2]}")
        return tensor_node(before, name, ctx.store.put(torch.cat(parts)))
    args = [
        _stack(gm, ctx, before, origin, (one, other), stem) if isinstance(one, fx.Node) else one
        for one, other in zip(gate.args, up.args, strict=True)
    ]
    suffix = f".gate_up{label(gate).removeprefix(label(origin))}"
    return call(before, gate.target, tuple(args), origin=origin, suffix=suffix)


def _bias_values(gm: fx.GraphModule, linear: Linear, other: Linear) -> Tensor:
    """The linear's bias; zeros of the other's dtype if it has none."""
    if linear.bias is not None:
        return get_tensor(gm, str(linear.bias.target))
    assert other.bias is not None
    return torch.zeros(linear.shape[0], dtype=other.bias.meta["val"].dtype)
