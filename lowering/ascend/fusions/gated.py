"""Gated activations over the halves of one tensor: npu_swiglu and npu_geglu; and npu_gelu."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from panguq.ir.call_arguments import arguments
from panguq.ir.canonical_views import GeGlu, SwiGlu
from panguq.ir.edit import call, label
from panguq.ir.views import Item
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.lowering.ascend.fusions.shared import FusionState, refusal

aten = torch.ops.aten
npu = torch.ops.npu


def fuse_swiglu(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`swiglu(y[..., :f], y[..., f:])` as `npu_swiglu(y, -1)`, or why not."""
    whole = _whole(SwiGlu.of(node), "npu_swiglu")
    if isinstance(whole, str):
        return whole
    args = (whole, -1)
    reason = refusal(npu.npu_swiglu.default, args)
    return reason or call(node, npu.npu_swiglu.default, args, origin=node)


def fuse_geglu(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`geglu(y[..., :f], y[..., f:])` as `npu_geglu(y, -1, approximate, True)[0]`, or why not.

    True lets gelu act on the first half; approximate is 1 for its tanh form, 0 for the exact one.
    """
    given = GeGlu.of(node)
    whole = _whole(given, "npu_geglu")
    if isinstance(whole, str):
        return whole
    args = (whole, -1, int(given.approximate == "tanh"), True)
    reason = refusal(npu.npu_geglu.default, args)
    if reason is not None:
        return reason
    results = call(node, npu.npu_geglu.default, args, origin=node, suffix=".fused")
    return call(node, operator.getitem, (results, 0), origin=node)


def fuse_gelu(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`aten.gelu(x)` as `npu_gelu(x)`, or why not.

    On an NPU aten's takes the tanh form whatever it is asked (op-plugin's page on npu_gelu).
    """
    given = arguments(node)
    args, kwargs = (given["self"],), {"approximate": given["approximate"]}
    reason = refusal(npu.npu_gelu.default, args, kwargs)
    return reason or call(node, npu.npu_gelu.default, args, kwargs, origin=node)


def _whole(gated: SwiGlu, op: str) -> fx.Node | str:
    """The tensor whose first half is the gate and whose second is what it is multiplied with."""
    gate, up = _part(gated.gate), _part(gated.up)
    if gate is None or up is None or gate.source is not up.source:
        return f"gate and up are two tensors, and {op} reads the halves of one"
    last = gate.source.meta["val"].shape[-1]
    if isinstance(last, torch.SymInt) or (gate.start, gate.end, up.start, up.end) != (
        0,
        last // 2,
        last // 2,
        last,
    ):
        return f"gate and up are not the first and the second half of {label(gate.source)}"
    return gate.source


class _Part(NamedTuple):
    """Columns `start` to `end` of a tensor."""

    source: fx.Node
    start: int
    end: int


def _part(node: fx.Node) -> _Part | None:
    """The columns that this node takes out of a tensor; None if it is something else."""
    value = node.meta["val"]
    last = (-1, value.dim() - 1) if isinstance(value, torch.Tensor) else ()
    if node.target is aten.slice.Tensor:
        given = arguments(node)
        start, end = given["start"], given["end"]
        if given["dim"] not in last or given["step"] != 1 or not _known(start, end):
            return None
        return _columns(given["self"], start or 0, value.shape[-1])
    item = Item.match(node)
    if item is None or item.source.target not in (aten.chunk.default, aten.split.Tensor):
        return None
    parts, index, given = item.source, item.index, arguments(item.source)
    widths = [item.shape[-1] for item in parts.meta["val"]]
    if given["dim"] not in last or any(isinstance(w, torch.SymInt) for w in widths):
        return None
    return _columns(given["self"], sum(widths[:index]), widths[index])


def _known(start: object, end: object) -> bool:
    """Whether the ends of a slice are known, and the first is not negative."""
    known = end is None or isinstance(end, int)
    return known and (start is None or (isinstance(start, int) and start >= 0))


def _columns(source: object, start: int, width: int | torch.SymInt) -> _Part | None:
    if not isinstance(source, fx.Node) or isinstance(width, torch.SymInt):
        return None
    return _Part(source, start, start + width)
