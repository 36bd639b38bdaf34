"""Ranges and statistics against brute force over the plain values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from panguq.ir.input_statistics import BINS, Histogram, InputStatistics
from panguq.ir.number_format import INT8
from panguq.ir.quant_spec import SCHEMES, QuantSpec
from panguq.passes.insert_fake_quant import affine
from panguq.passes.statistics.observers import OBSERVERS, mean_squared_error, range_sqnr_db

STATIC = SCHEMES["W8A8"].activation
SYMMETRIC = QuantSpec(INT8, "per_tensor")
assert STATIC is not None


def normal(tokens: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))


def histogram_of(*batches: Tensor, weights: Tensor | None = None) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch, torch.ones(batch.shape[1]) if weights is None else weights)
    return histogram


def every_fourth_four_times(x: Tensor) -> Tensor:
    """The histogram counts every fourth token: with each four times over it sees all."""
    return x.repeat_interleave(4, 0)


def quantize(x: Tensor, low: float, high: float, spec: QuantSpec) -> Tensor:
    """What the QDQ pair does, in float64."""
    scale, zero = affine(low, high, spec)
    codes = (x.double() / scale).round() + zero
    return (codes.clamp(spec.quant_min, spec.quant_max) - zero) * scale


# --- the histogram ------------------------------------------------------------------------------


@given(scales=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_histogram_is_that_of_all_values(scales, seed) -> None:
    """However its limit grew, the counts are those of the final bins."""
    batches = [every_fourth_four_times(normal(8, 6, seed + i) * s) for i, s in enumerate(scales)]
    histogram = histogram_of(*batches)
    values = torch.cat([b[::4] for b in batches]).flatten().double()
    assert histogram.counts.sum() == values.numel()
    assert (histogram.low, histogram.high) == (float(values.min()), float(values.max()))
    assert histogram.limit >= values.abs().max()
    assert histogram.limit < 2 * max(float(values.abs().max()), 2.0**-10)
    for bound in (-0.5, -0.25, 0.0, 0.125, 0.5):  # bin edges, whatever was merged into them
        edge = BINS // 2 + int(bound * BINS / 2)
        below = float(histogram.counts[:edge].sum())
        rounding = histogram.limit * 2**-22  # bins are computed in float32
        least = (values < bound * histogram.limit - rounding).sum()
        most = (values < bound * histogram.limit + rounding).sum()
        assert least <= below <= most


def test_channels_count_by_their_weight() -> None:
    x = torch.tensor([[1.0, -1.0]]).repeat(8, 1)
    histogram = histogram_of(x, weights=torch.tensor([3.0, 0.5]))
    positive = histogram.centers > 0
    assert float(histogram.counts[positive].sum()) == 6.0
    assert float(histogram.counts[~positive].sum()) == 1.0


# --- statistics ---------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_statistics_are_those_of_all_tokens(lengths, seed) -> None:
    batches = [normal(n, 5, seed + i) + 0.1 for i, n in enumerate(lengths)]
    seen = InputStatistics(5)
    for batch in batches:
        seen.add(batch.view(1, *batch.shape))
    every = torch.cat(batches)
    assert seen.tokens == seen.plain_tokens == sum(lengths)
    assert torch.equal(seen.channel_amax, every.abs().amax(0))
    assert torch.equal(seen.plain_amax, seen.channel_amax)
    torch.testing.assert_close(seen.mean_square, every.square().mean(0))
    torch.testing.assert_close(seen.plain_mean_square, seen.mean_square)


def test_a_massive_token_is_told_apart() -> None:
    x = normal(64, 8)
    x[10, 3] = 500.0
    seen = InputStatistics(8, torch.ones(8))
    seen.add(x)
    assert (seen.tokens, seen.plain_tokens) == (64, 63)
    plain = torch.cat((x[:10], x[11:]))
    assert float(seen.channel_amax[3]) == 500.0
    assert torch.equal(seen.plain_amax, plain.abs().amax(0))
    torch.testing.assert_close(seen.plain_mean_square, plain.square().mean(0))
    torch.testing.assert_close(seen.mean_square, x.square().mean(0))
    assert seen.histogram.high < 10
    assert seen.channel_ratio == pytest.approx(500 / float(seen.channel_amax.median()))


def test_a_massive_channel_is_no_massive_token() -> None:
    x = normal(64, 8)
    x[:, 3] *= 500
    seen = InputStatistics(8)
    seen.add(x)
    assert seen.plain_tokens >= 60  # the few left out are large even beside the others
    assert seen.channel_ratio > 100


def test_tokens_slightly_above_the_others_are_plain() -> None:
    x = torch.ones(9, 4)
    x[0] = 10.0
    seen = InputStatistics(4)
    seen.add(x)
    assert seen.plain_tokens == 9
    x[0] = 10.1
    seen = InputStatistics(4)
    seen.add(x)
    assert seen.plain_tokens == 8


# --- observers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
@given(shift=st.floats(-5, 5), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_a_range_lies_within_what_was_seen(observer, shift, scale, seed) -> None:
    x = (normal(32, 16, seed) + shift) * scale
    low, high = OBSERVERS[observer](histogram_of(x), STATIC, 99.9)
    assert float(x.min()) <= low < high <= float(x.max())


def test_minmax_is_the_smallest_and_the_largest() -> None:
    x = normal(33, 16)
    assert OBSERVERS["minmax"](histogram_of(x), STATIC, 99.9) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_that_of_the_values(percentile) -> None:
    x = normal(4000, 16)
    histogram = histogram_of(every_fourth_four_times(x))
    low, high = OBSERVERS["percentile"](histogram, STATIC, percentile)
    width = 2 * histogram.limit / BINS
    tail = 1 - percentile / 100

    def share(condition: Tensor) -> float:
        return float(condition.double().mean())

    assert share(x < low) <= tail <= share(x <= low + width)
    assert share(x > high) <= tail <= share(x >= high - width)


def test_percentile_hundred_is_minmax() -> None:
    histogram = histogram_of(normal(400, 16))
    assert OBSERVERS["percentile"](histogram, STATIC, 100.0) == pytest.approx(
        (histogram.low, histogram.high), abs=2 * histogram.limit / BINS
    )


def heavy_tailed() -> Tensor:
    x = normal(512, 32)
    return x * (1 + 30 * (normal(512, 32, 1).abs() > 3.5))


@pytest.mark.parametrize("spec", [STATIC, SYMMETRIC], ids=["affine", "symmetric"])
@pytest.mark.parametrize("values", [normal(512, 32), heavy_tailed(), normal(512, 32).relu()])
def test_the_model_of_the_error_is_the_error(spec, values) -> None:
    """Mean squared error off the histogram against quantizing every value, at many ranges."""
    histogram = histogram_of(every_fourth_four_times(values))
    for share in (1.0, 0.7, 0.4, 0.2):
        low, high = histogram.low * share, histogram.high * share
        if spec.symmetric:
            low, high = min(low, -high), max(-low, high)
        actual = float((quantize(values, low, high, spec) - values).square().mean())
        assert mean_squared_error(histogram, low, high, spec) == pytest.approx(actual, rel=0.1)
        signal = float(values.double().square().mean())
        expected_db = 10 * torch.log10(torch.tensor(signal / actual)).item()
        assert range_sqnr_db(histogram, low, high, spec) == pytest.approx(expected_db, abs=0.5)


@pytest.mark.parametrize("values", [normal(512, 32), heavy_tailed(), normal(512, 32).relu()])
def test_mse_is_the_best_clip_by_brute_force(values) -> None:
    histogram = histogram_of(every_fourth_four_times(values))
    low, high = OBSERVERS["mse"](histogram, STATIC, 99.9)
    amax = float(values.abs().max())
    errors = []
    for step in range(64):
        c = amax * 2 ** (-step / 8)
        clipped = quantize(values, max(histogram.low, -c), min(histogram.high, c), STATIC)
        errors.append(float((clipped - values).square().mean()))
    chosen = float((quantize(values, low, high, STATIC) - values).square().mean())
    assert chosen <= 1.02 * min(errors)
    whole = float(
        (quantize(values, histogram.low, histogram.high, STATIC) - values).square().mean()
    )
    assert chosen <= 1.001 * whole


@pytest.mark.parametrize("observer", ["histogram", "percentile"])
def test_one_far_value_is_clipped(observer) -> None:
    x = normal(4000, 16)
    x[40, 3] = 3000.0
    low, high = OBSERVERS[observer](histogram_of(x), STATIC, 99.9)
    assert -8 < low < -1 and 1 < high < 300
    assert OBSERVERS["minmax"](histogram_of(x), STATIC, 99.9)[1] == 3000.0


def test_divergence_keeps_a_uniform_range_whole() -> None:
    """Nothing can be cut from values that fill their range evenly."""
    x = torch.linspace(-1, 1, 16000).view(1000, 16)[torch.randperm(1000)]
    low, high = OBSERVERS["histogram"](histogram_of(every_fourth_four_times(x)), STATIC, 99.9)
    assert (low, high) == pytest.approx((-1, 1), abs=0.01)
