"""Fit the constants of a CPU kernel's cost to timings."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from panguq.errors import LoweringError
from panguq.lowering.cpu.tuning.timing import Timing
from panguq.lowering.target import KernelCost

FEWEST_TIMINGS = 6
SMALL_ERROR = 0.03  # below this an error counts by its square, above by its size
STEPS = 30
SMALLEST = (0.01, 1e-7, 1e-9)  # us a call, us a weight, us a product: a cost is above zero
DIGITS = 3

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class KernelFit:
    """A kernel's cost, and predicted / measured - 1 for every timing, in their order."""

    cost: KernelCost
    errors: tuple[float, ...]

    @property
    def mean_error(self) -> float:
        """Mean absolute error."""
        return statistics.fmean(map(abs, self.errors))

    @property
    def worst_error(self) -> float:
        """The error of the largest absolute value."""
        return max(self.errors, key=abs)


def fit_kernel(timings: Sequence[Timing], bytes_per_weight: float, source: str) -> KernelFit:
    """Fit `launch + bytes / bandwidth + products / rate` to the medians of one kernel's timings.

    Minimizes the relative errors, squared up to 3 % and by their absolute value beyond (Huber's
    loss by iteratively reweighted least squares), so that a few disturbed timings count little; no
    term is negative. `source` is completed by the errors. Raises LoweringError for fewer than 6
    timings, and for timings that cannot tell the three terms apart: they need several numbers of
    tokens and several sizes of the weight.
    """
    kernel = timings[0].kernel if timings else "a kernel"
    if len(timings) < FEWEST_TIMINGS:
        raise LoweringError(
            f"{kernel}: {len(timings)} timings are too few for a fit",
            f"give at least {FEWEST_TIMINGS}, for several numbers of tokens and several shapes",
        )
    measured = np.array([timing.median_us for timing in timings])
    if not np.isfinite(measured).all() or (measured <= 0).any():
        raise LoweringError(f"{kernel}: a timing is not above zero", "measure again")
    columns = np.array([[1.0, t.n * t.k, t.m * t.n * t.k] for t in timings])
    if np.linalg.matrix_rank(columns / columns.max(axis=0)) < columns.shape[1]:
        raise LoweringError(
            f"{kernel}: these timings cannot tell launch, bytes and products apart",
            "give several numbers of tokens and several shapes",
        )
    launch, weight, product = np.maximum(_robust(columns, measured), SMALLEST)
    cost = KernelCost(
        launch_us=_rounded(launch),
        gb_per_s=_rounded(bytes_per_weight / weight / 1e3),
        gmac_per_s=_rounded(1 / product / 1e3),
        weight_bytes_per_weight=bytes_per_weight,
    )
    fit = KernelFit(cost, tuple(float(predict_us(cost, t) / t.median_us - 1) for t in timings))
    text = (
        f"{source}; {len(timings)} timings, mean error {fit.mean_error:.1%}, "
        f"worst {fit.worst_error:+.0%}"
    )
    return replace(fit, cost=replace(cost, source=text))


def predict_us(cost: KernelCost, timing: Timing) -> float:
    """The cost's microseconds for the timing's m, n and k."""
    weights = timing.n * timing.k
    read = weights * cost.weight_bytes_per_weight / (cost.gb_per_s * 1e3)
    return cost.launch_us + read + timing.m * weights / (cost.gmac_per_s * 1e3)


def _robust(columns: Floats, measured: Floats) -> Floats:
    weights = 1 / measured
    for _ in range(STEPS):
        found = _nonnegative(columns * weights[:, None], measured * weights)
        errors = np.abs(columns @ found / measured - 1)
        weights = 1 / measured / np.sqrt(np.maximum(errors, SMALL_ERROR))
    return found


def _nonnegative(columns: Floats, wanted: Floats) -> Floats:
    """The best coefficients without a negative one: the best of all choices of columns."""
    count = columns.shape[1]
    best, smallest = np.zeros(count), float((wanted**2).sum())
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            # Columns differ by many powers of ten; scaled ones solve accurately.
            scales = np.abs(columns[:, chosen]).max(axis=0)
            found = np.linalg.lstsq(columns[:, chosen] / scales, wanted, rcond=None)[0] / scales
            left = float(((columns[:, chosen] @ found - wanted) ** 2).sum())
            if (found >= 0).all() and left < smallest:
                best, smallest = np.zeros(count), left
                best[chosen] = found
    return best


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
