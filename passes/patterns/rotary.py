"""Rotary position embedding, of halves or of neighbours, raised into `panguq.rotary`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from panguq.ir.call_arguments import arguments, operand, operands_at
from panguq.ir.edit import call
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.passes.patterns.matching import is_call, pair, through_wider_casts, type_of

aten = torch.ops.aten
panguq = torch.ops.panguq


def to_rotary(node: fx.Node) -> fx.Node | None:
    """Anchored at the sum `x * cos + turned(x) * sin`, x `[batch, heads, seq, d]`."""
    direct, rotated = pair(node)
    if node.kwargs or not (is_call(direct, aten.mul.Tensor) and is_call(rotated, aten.mul.Tensor)):
        return None
    (x, cos), (turned, sin) = pair(direct), pair(rotated)
    if not all(isinstance(n, fx.Node) for n in (x, cos, turned, sin)):
        return None
    source, turned = through_wider_casts(x), through_wider_casts(turned)
    interleaved = _neighbours_of(turned, source)
    if not interleaved and not _halves_of(turned, source):
        return None
    tables = [_per_token(node, table) for table in (cos, sin)]
    if None in tables:
        return None
    if type_of(x) != type_of(node):  # the op yields x's dtype, a sum with wider tables does not
        x = call(node, aten.to.dtype, (x, type_of(node)), origin=x, suffix=".wide")
    args = (x, *tables, True) if interleaved else (x, *tables)
    return call(node, panguq.rotary.default, args, origin=node)


def _per_token(node: fx.Node, table: fx.Node) -> fx.Node | None:
    """The table `[batch, seq, d]` that is one for all heads here, `[batch, 1, seq, d]`."""
    if is_call(table, aten.unsqueeze.default) and arguments(table)["dim"] == 1:
        return operand(table, 0)
    shape = table.meta["val"].shape
    if len(shape) != 4 or not isinstance(shape[1], int) or shape[1] != 1:
        return None
    return call(node, aten.squeeze.dim, (table, 1), origin=table, suffix=".per_token")


def _halves_of(turned: Any, x: fx.Node) -> bool:
    """Whether this is `concat(-x2, x1)` of the halves x1 and x2 of x."""
    if not is_call(turned, aten.cat.default) or arguments(turned)["dim"] not in (-1, 3):
        return False
    parts = operands_at(turned, 0)
    size = x.meta["val"].shape[-1]
    if len(parts) != 2 or not is_call(parts[0], aten.neg.default) or not isinstance(size, int):
        return False
    second, first, half = operand(parts[0], 0), parts[1], size // 2
    return (
        size == 2 * half
        and _slice(first) == (x, 0, half, 1)
        and _slice(second) in ((x, half, None, 1), (x, half, size, 1))
    )


def _neighbours_of(turned: Any, x: fx.Node) -> bool:
    """Whether each pair (a, b) of neighbours in x became (-b, a)."""
    if not is_call(turned, aten.flatten.using_ints, aten.reshape.default, aten.view.default):
        return False
    stacked = operand(turned, 0)
    if not is_call(stacked, aten.stack.default) or turned.meta["val"].dim() != 4:
        return False
    parts = operands_at(stacked, 0)
    if len(parts) != 2 or arguments(stacked)["dim"] not in (-1, 4):
        return False
    if not is_call(parts[0], aten.neg.default):
        return False
    odd, even = operand(parts[0], 0), parts[1]
    whole = turned.meta["val"].shape[-1] == x.meta["val"].shape[-1]
    return whole and _slice(even) == (x, 0, None, 2) and _slice(odd) == (x, 1, None, 2)


def _slice(node: Any) -> tuple[fx.Node, int, int | None, int] | None:
    """Of which tensor, from where, up to where (None: its end) and by which step."""
    if not is_call(node, aten.slice.Tensor) or arguments(node)["dim"] not in (-1, 3):
        return None
    given = arguments(node)
    end = given["end"]
    open_end = end is None or (isinstance(end, int) and end >= 2**62)
    source = through_wider_casts(given["self"])
    return (source, given["start"] or 0, None if open_end else end, given["step"])
