"""Scales of weights against a slow, obvious reference; the clip search is never worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from panguq.ir.number_format import INT8
from panguq.ir.ops.quantize import dequantize_weight, quantize_weight
from panguq.ir.quant_spec import SCHEMES, QuantSpec, parse_scheme
from panguq.passes.codes.weight_scales import (
    affine_scale,
    min_max_scale,
    quantize_groups,
    search_scale,
    storable,
    weight_codes,
    weight_values,
)

RATIOS = tuple(torch.linspace(1.0, 0.6, 9).tolist())
SPECS = {name: SCHEMES[name].weight for name in ("W8A8", "W4A16", "W4A16_ASYM")}
SPECS["W8-g32"] = QuantSpec(INT8, "per_group", group_size=32)
SPECS["W8-asym"] = QuantSpec(INT8, "per_channel", symmetric=False)
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def weights(seed: int, n: int = 3, k: int = 64, kind: str = "normal") -> Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    if kind == "outlier":
        w[0, seed % k] *= 40
    if kind == "grid":  # exactly on a grid of 15 codes
        w = (w * 3).round().clamp(-7, 7)
    if kind == "positive":
        w = w.abs() + 1
    if kind == "zero":
        w[1] = 0
    return w


KINDS = st.sampled_from(["normal", "outlier", "grid", "positive", "zero"])


def obvious_scale(group: list[float], spec: QuantSpec) -> tuple[float, int]:
    """One group, in plain Python floats."""
    if spec.symmetric:
        return max(max(abs(w) for w in group) / spec.quant_max, 1e-10), 0
    low, high = min(*group, 0.0), max(*group, 0.0)
    scale = max((high - low) / (spec.quant_max - spec.quant_min), 1e-10)
    if spec.bits <= 4:
        scale = float(torch.tensor(scale).bfloat16())
    zero = round(spec.quant_min - low / scale)
    return scale, min(max(zero, spec.quant_min), spec.quant_max)


@each_spec
@given(seed=st.integers(0, 999), kind=KINDS)
def test_scales_are_the_obvious_ones(spec, seed, kind) -> None:
    w = weights(seed, kind=kind)
    size = spec.group_size_for(64)
    scale, zero = min_max_scale(w, size, spec)
    assert scale.shape == (3, 64 // size)
    assert scale.dtype == (torch.bfloat16 if spec.bits == 4 else torch.float32)
    assert (zero is None) == spec.symmetric
    for row in range(3):
        for g in range(64 // size):
            group = w[row, g * size : (g + 1) * size].tolist()
            expected, offset = obvious_scale(group, spec)
            rel = 2**-8 if spec.bits == 4 else 1e-6
            assert float(scale[row, g]) == pytest.approx(expected, rel=rel)
            if zero is not None:
                assert abs(int(zero[row, g]) - offset) <= (1 if spec.bits == 8 else 0)


@each_spec
@given(seed=st.integers(0, 999), kind=KINDS)
def test_round_to_nearest_is_off_by_half_a_step(spec, seed, kind) -> None:
    """The ops' codes and the searched grid agree; zero stays zero where nothing is clipped."""
    w = weights(seed, kind=kind)
    size = spec.group_size_for(64)
    scale, zero = min_max_scale(w, size, spec)
    codes = quantize_weight(w, scale, zero, size, spec.quant_min, spec.quant_max)
    assert codes.min() >= spec.quant_min and codes.max() <= spec.quant_max
    values = dequantize_weight(codes, scale, zero, size, torch.float32)
    grid = quantize_groups(w.view(3, -1, size), scale, zero, spec)
    assert torch.equal(values, grid.view(3, 64))
    step = scale.float().repeat_interleave(size, 1)
    # bfloat16 scales may fall short of the largest weight, a rounded zero point of one end.
    slack = 0.5 + (spec.quant_max * 2**-8 if spec.bits == 4 else 1e-4)
    slack += 0 if spec.symmetric else 0.5
    assert ((values - w).abs() <= slack * step).all()
    assert (values[w == 0] == 0).all()


def test_a_row_of_zeros_gives_zeros() -> None:
    for spec in SPECS.values():
        size = spec.group_size_for(64)
        scale, zero = min_max_scale(torch.zeros(2, 64), size, spec)
        assert (scale > 0).all() and torch.isfinite(scale).all()
        codes = quantize_weight(torch.zeros(2, 64), scale, zero, size, spec.quant_min, 7)
        assert not dequantize_weight(codes, scale, zero, size, torch.float32).any()


def test_an_affine_range_is_widened_to_hold_zero() -> None:
    spec = SPECS["W8-asym"]
    scale, zero = affine_scale(torch.tensor([[2.0]]), torch.tensor([[5.1]]), spec)
    assert (float(scale), int(zero)) == (pytest.approx(5.1 / 255), -128)
    scale, zero = affine_scale(torch.tensor([[-5.1]]), torch.tensor([[-2.0]]), spec)
    assert (float(scale), int(zero)) == (pytest.approx(5.1 / 255), 127)


# --- clip search --------------------------------------------------------------------------------


def weighted_error(
    w: Tensor, scales: tuple, size: int, spec: QuantSpec, h: Tensor | None
) -> Tensor:
    """Per group, in float64."""
    groups = w.view(w.shape[0], -1, size)
    error = (quantize_groups(groups, *scales, spec).double() - groups).square()
    return (error if h is None else error * h.double().view(-1, size)).sum(-1)


@each_spec
@given(seed=st.integers(0, 9999), kind=KINDS, weigh=st.booleans())
def test_the_search_is_never_worse_than_no_search(spec, seed, kind, weigh) -> None:
    """In its own error, for every group; up to float32's rounding of that error's sum."""
    w = weights(seed, kind=kind)
    h = torch.rand(64, generator=torch.Generator().manual_seed(seed)) ** 4 if weigh else None
    size = spec.group_size_for(64)
    plain = weighted_error(w, min_max_scale(w, size, spec), size, spec, h)
    best = weighted_error(w, search_scale(w, size, spec, h, RATIOS), size, spec, h)
    assert (best <= plain * (1 + 1e-5) + 1e-12).all()


@each_spec
def test_the_search_is_the_argmin_of_its_grid(spec) -> None:
    """Brute force over ratios and signs, one group at a time."""
    w, h = weights(3, kind="outlier"), torch.rand(64)
    size = spec.group_size_for(64)
    found = weighted_error(w, search_scale(w, size, spec, h, RATIOS), size, spec, h)
    options = [min_max_scale(w, size, spec)]
    groups = w.view(3, -1, size)
    for ratio in RATIOS:
        low, high = groups.amin(-1) * ratio, groups.amax(-1) * ratio
        if not spec.symmetric:
            options.append(affine_scale(low, high, spec))
            continue
        amax = torch.maximum(low.abs(), high.abs())
        steps = [amax / 127] if spec.bits == 8 else [amax / 8, -amax / 8]
        dtype = torch.float32 if spec.bits == 8 else torch.bfloat16
        options += [(step.to(dtype), None) for step in steps]
    errors = torch.stack([weighted_error(w, option, size, spec, h) for option in options])
    assert torch.allclose(found, errors.amin(0), rtol=1e-5)


def test_the_search_helps_where_it_should() -> None:
    spec = SPECS["W4A16"]
    w = weights(0, n=8, k=128)
    plain = weighted_error(w, min_max_scale(w, 128, spec), 128, spec, None).sum()
    best = weighted_error(w, search_scale(w, 128, spec, None, RATIOS), 128, spec, None).sum()
    assert best < 0.9 * plain


def test_importance_decides_what_is_clipped() -> None:
    """An outlier that meets no activation is clipped, one that meets a large one is not."""
    spec = SPECS["W4A16"]
    w = weights(0, n=1, k=128, kind="outlier")
    column = int(w.abs().argmax())
    careless, careful = torch.ones(128), torch.ones(128)
    careless[column], careful[column] = 0.0, 1e6
    low, high = (abs(float(search_scale(w, 128, spec, h, RATIOS)[0])) for h in (careless, careful))
    assert low < 0.8 * high


@pytest.mark.parametrize(("k", "size"), [(576, 64), (96, 32), (1536, 128), (64, 64)])
def test_groups_that_do_not_divide(k, size) -> None:
    spec = SPECS["W4A16"]
    assert spec.group_size_for(k) == size
    assert min_max_scale(torch.randn(2, k), size, spec)[0].shape == (2, k // size)
    with pytest.raises(ValueError, match=f"divides k = {k - 8}"):
        replace(spec, group_size=128).group_size_for(k - 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_keeps_8_bit_scales_in_its_own_dtype(dtype) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    spec = QuantSpec(INT8, "per_channel")
    searched, _ = search_scale(weight, 64, spec, None, (1.0, 0.9))
    for scale in (min_max_scale(weight, 64, spec)[0], searched):
        assert scale.dtype == torch.float32
        assert torch.equal(scale, scale.to(dtype).float())
    assert (min_max_scale(torch.zeros(8, 64, dtype=dtype), 64, spec)[0] > 0).all()


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16-g32", "W4A16_ASYM-g32", "W3A16-sym-g32"])
@pytest.mark.parametrize("amax", [6e-8, 4e-7, 2e-6, 2e-5, 1e-3])
def test_a_float16_model_keeps_its_smallest_weights(scheme: str, amax: float) -> None:
    """Below 2^-14 a float16 number is a whole number of 2^-24, and so are the scales: none is zero,
    and no weight is clipped. As many codes as fit serve; a step of 2^-24 is the finest there is."""
    spec = parse_scheme(scheme).weight
    assert spec is not None
    generator = torch.Generator().manual_seed(0)
    weight = (torch.rand(16, 64, generator=generator) * 2 - 1) * amax
    weight = weight.half()
    size = spec.group_size_for(64)
    plain = min_max_scale(weight, size, spec)
    searched = search_scale(weight, size, spec, None, RATIOS)
    errors = []
    for scale, zero in (plain, searched):
        assert torch.equal(scale.float(), scale.half().float()) and (scale != 0).all()
        groups = weight.float().unflatten(1, (-1, size))
        errors.append(float((quantize_groups(groups, scale, zero, spec) - groups).abs().max()))
    levels = spec.quant_max if spec.symmetric else spec.quant_max - spec.quant_min
    width = amax if spec.symmetric else 2 * amax
    assert errors[0] <= max(width / levels, 2.0**-24) * 1.01  # a scale's own rounding shifts zero
    assert errors[0] == 0 or width / levels > 2.0**-24


WEIGHTS = {name: scheme.weight for name, scheme in SCHEMES.items() if scheme.weight}


def levels_of(spec: QuantSpec) -> Tensor:
    """The value of every code, without scale and zero point."""
    codes = torch.arange(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1), dtype=torch.int8)
    levels = spec.format.decode(codes.view(spec.format.storage))
    return levels[~levels.isnan()]


@given(name=st.sampled_from(sorted(WEIGHTS)), seed=st.integers(0, 999), kind=KINDS)
def test_no_code_stands_for_a_nearer_weight(name: str, seed: int, kind: str) -> None:
    """In every format, with and without zero points."""
    spec, weight = WEIGHTS[name], weights(seed, kind=kind)
    size = spec.group_size_for(64)
    scale, zero = min_max_scale(weight, size, spec)
    codes = weight_codes(weight, scale, zero, size, spec)
    values = weight_values(codes, scale, zero, size, spec, torch.float32)
    groups = weight.unflatten(1, (-1, size))
    assert torch.equal(values, quantize_groups(groups, scale, zero, spec).flatten(1))
    offset = 0 if zero is None else zero.float()
    grid = (levels_of(spec)[:, None, None] - offset) * scale.float()
    least = (grid[..., None].double() - groups.double()).abs().amin(0)
    error = (values.view(groups.shape).double() - groups.double()).abs()
    assert (error <= least + 1e-6 * groups.abs().amax()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_weights_of_wide_dtypes_are_quantized_as_others(dtype: torch.dtype) -> None:
    """Powers of two change nothing but the scale."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    spec = QuantSpec(INT8, "per_channel")
    scale, _ = min_max_scale(weight, 64, spec)
    tiny, _ = min_max_scale(weight * 2.0**-60, 64, spec)
    assert torch.equal(tiny, scale * 2.0**-60)


def test_scales_of_codes_that_exist_are_rounded_to_the_nearest() -> None:
    """A tuned scale of 1.1 steps is one step; for codes to come it would be two."""
    step = 2.0**-24
    scale = torch.tensor([0.1, 1.1, -1.1, 2.6]) * step
    assert (storable(scale, torch.float16) / step).tolist() == [1, 1, -1, 3]
    assert (storable(scale, torch.float16, above=True) / step).tolist() == [1, 2, -2, 3]
    assert torch.equal(storable(scale.bfloat16(), torch.bfloat16), scale.bfloat16())
    assert storable(scale.bfloat16(), torch.float16).dtype == torch.bfloat16
