"""The cheapest of many kernels for every number of tokens, and few ranges that cover them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Totals = Callable[[Sequence[int], NDArray[np.int64]], Floats]
"""Costs `[rows, tokens]` of some rows, for some numbers of tokens."""

BLOCK = 64  # tokens between two looks at all rows


def survivors(
    totals: Totals, rows: Sequence[int], steady: Sequence[int], last_m: int, tolerance: float
) -> list[int]:
    """The rows that are within `tolerance` of the cheapest for some m in 1 … last_m, and perhaps
    some more.

    The cost of a row in `steady` never falls as m grows. Between two numbers of tokens, it is
    therefore at least its cost at the first, and the cheapest row costs at most what the cheapest
    steady row costs at the second. A steady row that costs more than this in every block is
    dropped. The other rows always stay.
    """
    edges = np.unique(np.append(np.arange(1, last_m + 1, BLOCK), last_m))
    costs = totals(steady, edges)
    if not len(steady):
        return list(rows)
    limit = (1 + tolerance) * costs.min(axis=0)[1:] if len(edges) > 1 else costs.min(axis=0)
    starts = costs[:, :-1] if len(edges) > 1 else costs
    alive = (starts <= limit).any(axis=1) | (costs[:, -1] <= (1 + tolerance) * costs[:, -1].min())
    kept = {row for row, lives in zip(steady, alive, strict=True) if lives}
    return [row for row in rows if row in kept or row not in set(steady)]


def ranges(costs: Floats, tolerance: float) -> list[tuple[int, int, int]]:
    """Ranges (first, last, row) of columns, both ends included, each with one row whose cost is
    at most `1 + tolerance` times the smallest in every column of it.

    There are as few ranges as can be: each goes as far as any row reaches. Of rows that reach
    equally far the one with the smallest sum is taken, then the first.
    """
    fits = costs <= (1 + tolerance) * costs.min(axis=0)
    columns = costs.shape[1]
    found, first = [], 0
    while first < columns:
        misses = ~fits[:, first:]
        reach = np.where(misses.any(axis=1), misses.argmax(axis=1), columns - first)
        longest = int(reach.max())
        candidates = np.flatnonzero(reach == longest)
        sums = costs[candidates, first : first + longest].sum(axis=1)
        row = int(candidates[int(sums.argmin())])
        found.append((first, first + longest - 1, row))
        first += longest
    return found
