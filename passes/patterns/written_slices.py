"""A tensor that is made empty and then filled slice by slice, as one concatenation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from panguq.ir.call_arguments import arguments, operand
from panguq.ir.edit import call

aten = torch.ops.aten
_EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)


def concatenation(node: fx.Node) -> fx.Node | None:
    """Anchored at the last `slice_scatter`, if all slices together are the whole tensor.

        e = new_empty(...); slice_scatter(slice_scatter(e, a, d, 0, k), b, d, k)  ─►  cat([a, b], d)

    A slice is written as `copy(slice(e, d, 0, k), a)`.
    """
    dim = int(arguments(node)["dim"])
    rank = len(node.meta["val"].shape)
    parts: dict[int, tuple[Any, fx.Node]] = {}
    base: Any = node
    while isinstance(base, fx.Node) and base.target is aten.slice_scatter.default:
        given = arguments(base)
        start, end = given["start"] or 0, given["end"]
        if given["dim"] != dim or given["step"] != 1 or not isinstance(start, int):
            return None
        source = _copied(given["src"])
        if source is None or start in parts:
            return None
        parts[start] = (end, source)
        base = given["self"]
    if not isinstance(base, fx.Node) or base.target not in _EMPTY:
        return None
    size, reached, ordered = node.meta["val"].shape[dim], 0, []
    for start, (end, source) in sorted(parts.items()):
        if start != reached or not isinstance(size, int):
            return None
        whole = end is None or (isinstance(end, int) and end >= size)
        reached = size if whole else int(end)
        ordered.append(source)
    if reached != size:
        return None
    return call(node, aten.cat.default, (ordered, dim % rank), origin=node)


def _copied(written: Any) -> fx.Node | None:
    """What was copied into a slice, if it has the slice's own shape and dtype."""
    if not isinstance(written, fx.Node):
        return None
    if written.target is not aten.copy.default:
        return written
    source, into = operand(written, 1), written.meta["val"]
    value = source.meta["val"]
    same = value.dtype == into.dtype and list(value.shape) == list(into.shape)
    return source if same else None
