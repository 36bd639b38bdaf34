"""Times of single matmuls that were measured: they stand in a target, beside its constants."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from panguq.lowering.problem import Candidate, Dtype, MatmulProblem, WeightFormat

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Microseconds of one call of `kernel`, for a problem with these sizes and this scheme."""

    kernel: str
    m: int
    n: int
    k: int
    scheme: str
    dtype: Dtype
    weight_format: WeightFormat
    us: float


def measured_for(
    found: Iterable[Measured], candidate: Candidate, problem: MatmulProblem
) -> list[Measured]:
    """Those of this kernel, shape and scheme, by m. Of integer matmuls static and dynamic inputs
    are one: the kernel is the same."""
    if candidate.schedule != "vendor" or problem.experts:
        return []
    mine = (candidate.kernel, problem.n, problem.k, _kind(problem.scheme.name), problem.dtype)
    same = [
        row
        for row in found
        if (row.kernel, row.n, row.k, _kind(row.scheme), row.dtype) == mine
        and row.weight_format == problem.weight_format
    ]
    return sorted(same, key=lambda row: row.m)


def corrected(us: Floats, tokens: Sequence[int], same: Sequence[Measured], at: Floats) -> Floats:
    """Predictions `us` for `tokens`, where something was measured replaced by it.

    at: the prediction at each measured m. Between two of them the ratio of measured to predicted is
    interpolated, linear in log m, and the result kept between both times; below the first and above
    the last the prediction stays.
    """
    known = [row.m for row in same]
    marks = [math.log(m) for m in known]
    ratios = [row.us / float(prediction) for row, prediction in zip(same, at, strict=True)]
    result = us.copy()
    for column, m in enumerate(tokens):
        if same[0].m <= m <= same[-1].m:
            after = bisect.bisect_left(known, m)
            before = after if known[after] == m else after - 1
            ends = (same[before].us, same[after].us)
            between = us[column] * float(np.interp(math.log(m), marks, ratios))
            result[column] = min(max(between, min(ends)), max(ends))
    return result


def how_known(same: Sequence[Measured], m: int) -> str:
    """How a time at `m` follows from what was measured; empty if it does not."""
    if not same or not same[0].m <= m <= same[-1].m:
        return ""
    place = bisect.bisect_left([row.m for row in same], m)
    if same[place].m == m:
        return "measured"
    return f"interpolated between measured m={same[place - 1].m} and m={same[place].m}"


def _kind(scheme: str) -> str:
    return scheme.replace("W8A8_DYNAMIC", "W8A8").replace("W4A16_ASYM", "W4A16")
