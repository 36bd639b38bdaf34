"""swiglu over the halves of one tensor as npu_swiglu."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from panguq.ir.edit import call, label
from panguq.kernels.ascend import npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.passes.fuse_ascend_shared import FusionState, refusal

aten = torch.ops.aten
npu = torch.ops.npu


def fuse_swiglu(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`swiglu(y[..., :f], y[..., f:])` as `npu_swiglu(y, -1)`, or why not."""
    gate, up = (_part(n) for n in node.args)
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
    if node.target is aten.slice.Tensor:
        source, dim, start, end, step = (*node.args, *(0, 0, None, 1)[len(node.args) - 1 :])[:5]
        if dim not in (-1, value.dim() - 1) or step != 1 or not _whole(start, end):
            return None
        return _columns(source, start or 0, value.shape[-1])
    index = node.args[1] if len(node.args) > 1 else None
    parts = node.args[0] if node.args else None
    if not isinstance(parts, fx.Node) or not isinstance(index, int):
        return None
    if parts.target not in (aten.chunk.default, aten.split.Tensor) or len(parts.args) != 3:
        return None
    source, _, dim = parts.args
    widths = [item.shape[-1] for item in parts.meta["val"]]
    if dim not in (-1, value.dim() - 1) or any(isinstance(w, torch.SymInt) for w in widths):
        return None
    return _columns(source, sum(widths[:index]), widths[index])


def _whole(start: object, end: object) -> bool:
    """Whether the ends of a slice are known and not negative."""
    known = all(limit is None or isinstance(limit, int) for limit in (start, end))
    return known and (start is None or start >= 0)


def _columns(source: object, start: int, width: int | torch.SymInt) -> _Part | None:
    if not isinstance(source, fx.Node) or isinstance(width, torch.SymInt):
        return None
    return _Part(source, start, start + width)
