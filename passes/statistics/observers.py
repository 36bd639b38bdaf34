"""The static range that each observer reads off what calibration remembers of a value."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from panguq.decibels import decibels
from panguq.ir.input_statistics import BINS, Histogram
from panguq.ir.quant_spec import QuantSpec

Range = tuple[float, float]


def min_max(histogram: Histogram, spec: QuantSpec, percentile: float) -> Range:
    """The smallest and the largest value of plain tokens."""
    return histogram.low, histogram.high


def percentile_range(histogram: Histogram, spec: QuantSpec, percentile: float) -> Range:
    """The values below which `100 - percentile` and `percentile` percent of all values lie."""
    share = histogram.counts.cumsum(0) / histogram.counts.sum()
    width = 2 * histogram.limit / BINS
    tail = 1 - percentile / 100
    low = float(histogram.centers[int(torch.searchsorted(share, tail))]) - width / 2
    index = min(int(torch.searchsorted(share, 1 - tail)), BINS - 1)
    high = float(histogram.centers[index]) + width / 2
    return max(low, histogram.low), min(high, histogram.high)


def _clipped_ranges(histogram: Histogram) -> list[Range]:
    """Ranges cut at +-c, c falling from the largest magnitude in steps of 2^(1/8), 8 octaves."""
    amax = max(-histogram.low, histogram.high)
    limits = [amax * 2 ** (-step / 8) for step in range(64)]
    return [(max(histogram.low, -c), min(histogram.high, c)) for c in limits]


def mean_squared_error(histogram: Histogram, low: float, high: float, spec: QuantSpec) -> float:
    """Expected squared error of quantizing the histogram's values on [low, high].

    Values inside err by `scale^2 / 12`, or by their own square where they are smaller than
    that and so round to zero; values outside by their distance to the range.
    """
    span = 2 * max(-low, high) if spec.symmetric else max(high, 0.0) - min(low, 0.0)
    scale = max(span, 1e-30) / (spec.quant_max - spec.quant_min)
    x = histogram.centers
    rounding = x.square().clamp(max=scale**2 / 12)
    outside = (x - x.clamp(low, high)).square()
    inside = (x >= low) & (x <= high)
    error = torch.where(inside, rounding, outside + rounding)
    return float((error * histogram.counts).sum() / histogram.counts.sum())


def range_sqnr_db(histogram: Histogram, low: float, high: float, spec: QuantSpec) -> float:
    """Signal to quantization noise of the histogram's values on [low, high], in dB."""
    signal = float((histogram.centers.square() * histogram.counts).sum() / histogram.counts.sum())
    noise = mean_squared_error(histogram, low, high, spec)
    return decibels(max(signal, 1e-30) / max(noise, 1e-30))


def least_squares(histogram: Histogram, spec: QuantSpec, percentile: float) -> Range:
    """The clipped range of least mean squared error."""
    ranges = _clipped_ranges(histogram)
    errors = [mean_squared_error(histogram, low, high, spec) for low, high in ranges]
    return ranges[errors.index(min(errors))]


def least_divergence(histogram: Histogram, spec: QuantSpec, percentile: float) -> Range:
    """The clipped range of least KL(values ‖ quantized values), as TensorRT calibrates int8.

    Szymon Migacz, "8-bit Inference with TensorRT", GTC 2017: what lies outside is moved to the
    last bin of the reference, and each code spreads its count over the bins it had filled.
    """
    levels = spec.quant_max - spec.quant_min + 1
    ranges = _clipped_ranges(histogram)
    divergences = [_divergence(histogram, low, high, levels) for low, high in ranges]
    return ranges[divergences.index(min(divergences))]


def _divergence(histogram: Histogram, low: float, high: float, levels: int) -> float:
    x, counts = histogram.centers, histogram.counts
    inside = (x >= low) & (x <= high)
    reference = counts[inside].clone()
    if reference.numel() < 2:
        return math.inf
    reference[0] += counts[x < low].sum()
    reference[-1] += counts[x > high].sum()
    kept = counts[inside]
    code = (torch.arange(kept.numel()) * levels // kept.numel()).clamp(max=levels - 1)
    filled = (kept > 0).double()
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, code, kept)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, code, filled)
    spread = (total / bins.clamp_min(1))[code] * filled
    p, q = reference / reference.sum(), spread / spread.sum().clamp_min(1e-30)
    both = (p > 0) & (q > 0)
    missed = float(p[(p > 0) & (q == 0)].sum())
    return float((p[both] * (p[both] / q[both]).log()).sum()) + missed * 20


OBSERVERS: dict[str, Callable[[Histogram, QuantSpec, float], Range]] = {
    "minmax": min_max,
    "percentile": percentile_range,
    "mse": least_squares,
    "histogram": least_divergence,
}
