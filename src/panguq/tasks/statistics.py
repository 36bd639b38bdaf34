"""Paired statistics: two models answered the same items, so that their differences are compared.

Accuracies differ by what flipped: McNemar's exact test. Means differ by a paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95

Statistic = Callable[[np.ndarray], np.ndarray]
"""From scores `[..., items]` to a value `[...]`."""


def mean(scores: np.ndarray) -> np.ndarray:
    """The mean over the last axis."""
    return scores.mean(-1)


def exp_mean(scores: np.ndarray) -> np.ndarray:
    """Perplexity: exp of the mean of negative log likelihoods; inf where that overflows."""
    with np.errstate(over="ignore"):
        return np.exp(scores.mean(-1))


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean: the sample's deviation over the root of its size, as lm-eval has it."""
    if len(scores) < 2:
        return 0.0
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores)))


def flips(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    """(right to wrong, wrong to right) of items that are right with a score above one half."""
    pairs = [(x > 0.5, y > 0.5) for x, y in zip(before, after, strict=True)]
    return sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """McNemar's exact p, two-sided: the flips as tosses of a fair coin."""
    from scipy.stats import binomtest

    total = right_to_wrong + wrong_to_right
    return float(binomtest(right_to_wrong, total, 0.5).pvalue) if total else 1.0


def paired_interval(
    before: Sequence[float], after: Sequence[float], statistic: Statistic = mean
) -> tuple[float, float]:
    """The 95 % bootstrap interval of statistic(after) - statistic(before), items resampled.

    Percentiles of 2,000 seeded resamples (Efron and Tibshirani, An Introduction to the Bootstrap,
    chapter 13).
    """
    chosen = _resamples(len(before))
    x, y = np.asarray(before)[chosen], np.asarray(after)[chosen]
    low, high = np.nanquantile(statistic(y) - statistic(x), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_p(before: Sequence[float], after: Sequence[float]) -> float:
    """The p of a paired t-test, two-sided; 1 where no item differs or there is only one."""
    from scipy.stats import ttest_rel

    if len(before) < 2 or np.array_equal(before, after):
        return 1.0
    return float(ttest_rel(after, before).pvalue)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes, unbiased: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    if samples - passed < k:
        return 1.0
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def _resamples(items: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, items, (RESAMPLES, items))
