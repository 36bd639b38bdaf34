"""swiglu over the halves of one tensor as npu_swiglu."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from panguq.ir.canonical_views import SwiGlu
from panguq.ir.edit import call, label
from panguq.ir.views import Item, arguments
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.lowering.ascend.fusions.shared import FusionState, refusal

aten = torch.ops.aten
npu = torch.ops.npu


def fuse_swiglu(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`swiglu(y[..., :f], y[..., f:])` as `npu_swiglu(y, -1)`, or why not."""
    gate, up = _part(SwiGlu.of(node).gate), _part(SwiGlu.of(node).up)
    if gate is None or up is None or gate.source is not up.source:
        return "gate and up are two tensors, and npu_swiglu reads the halves of one"
    last = gate.source.meta["val"].shape[-1]
    if isinstance(last, torch.SymInt) or (gate.start, gate.end, up.start, up.end) != (
        0,
        last // 2,
        last // 2,
        last,
    ):
        return f"gate and up are not the first and the second half of {label(gate.source)}"
    args = (gate.source, -1)
    reason = refusal(npu.npu_swiglu.default, args)
    return reason or call(node, npu.npu_swiglu.default, args, origin=node)


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
        if given["dim"] not in last or given["step"] != 1 or not _whole(start, end):
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


def _whole(start: object, end: object) -> bool:
    """Whether the ends of a slice are known, and the first is not negative."""
    known = end is None or isinstance(end, int)
    return known and (start is None or (isinstance(start, int) and start >= 0))


def _columns(source: object, start: int, width: int | torch.SymInt) -> _Part | None:
    if not isinstance(source, fx.Node) or isinstance(width, torch.SymInt):
        return None
    return _Part(source, start, start + width)
