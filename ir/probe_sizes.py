"""Small sizes at which graphs are proved, within the sizes that their traces hold for."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch import fx

Sizes = Mapping[str, int]
Limits = Mapping[str, tuple[int, int | None]]
"""The least and the largest value of a named size (0 and None: any), as an interface has them.
A graph keeps those of its trace as `gm.meta["size_limits"]`."""

PROBE_SIZES = {"batch": 2, "seq": 6, "past": 4, "kept": 3}
# A site may change what a cache holds (v / s), so regions are proved without a past: what the
# graph then appends to its own cache is part of the region.
SITE_PROBE_SIZES = {**PROBE_SIZES, "past": 0}
OTHER_SIZE = 4


def probe_size(gm: fx.GraphModule, size: int | torch.SymInt, sizes: Sizes) -> int:
    """A small concrete value for a possibly symbolic size, the same in every tensor."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    return int(expr.subs({s: _small(gm, s, sizes) for s in expr.free_symbols}))


def excluded(gm: fx.GraphModule) -> set[sympy.Symbol]:
    """The sizes in those of the trace's guards that small sizes break.

    Inequalities are not among them: export tells 0 and 1 from all other sizes, the graph does not.
    """
    symbolic = [
        size
        for node in gm.graph.nodes
        if node.op == "placeholder"
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    ]
    free = {symbol for size in symbolic for symbol in size.node.expr.free_symbols}
    small = {symbol: _small(gm, symbol, PROBE_SIZES) for symbol in free}
    broken = [
        guard.expr.free_symbols
        for guard in (symbolic[0].node.shape_env.guards if symbolic else ())
        if guard.expr.free_symbols <= free
        and not isinstance(guard.expr, sympy.Ne)
        and guard.expr.subs(small) == sympy.false
    ]
    alone = [symbols for symbols in broken if len(symbols) == 1]  # of several, one may be to blame
    return {symbol for symbols in alone or broken for symbol in symbols}


def _small(gm: fx.GraphModule, symbol: sympy.Symbol, sizes: Sizes) -> int:
    name = gm.meta.get("symbol_names", {}).get(symbol, "")
    least, largest = gm.meta.get("size_limits", {}).get(name, (0, None))
    chosen = sizes.get(name, OTHER_SIZE)
    chosen = chosen if chosen >= least else least + 2  # the least itself often leaves a size of 1
    return chosen if largest is None else min(chosen, largest)
