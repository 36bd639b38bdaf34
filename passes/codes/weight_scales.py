"""Scales and zero points of stored weights: from their range, or searched."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from panguq.errors import RecipeError
from panguq.ir.ops import encode, quantize  # noqa: F401  (register the ops)
from panguq.ir.quant_spec import QuantSpec
from panguq.tensors.row_slices import row_slices

panguq = torch.ops.panguq

SMALLEST_SCALE = 1e-30  # a smaller one is of a group without weights, and stands as
EMPTY_SCALE = 1e-10


def clip_ratios(smallest_ratio: float = 0.6, steps: int = 9) -> tuple[float, ...]:
    """What a clip search multiplies each group's range by: `steps` ratios from 1 down."""
    return tuple(torch.linspace(1.0, smallest_ratio, steps).tolist())


def check_clip_search(owner: str, smallest_ratio: float, steps: int) -> None:
    """Raises RecipeError, naming the pass `owner`, for options that make no `clip_ratios`."""
    if not 0.0 < smallest_ratio <= 1.0 or steps < 1:
        raise RecipeError(
            f"{owner}: smallest_ratio {smallest_ratio} must lie in (0, 1] and "
            f"steps {steps} be at least 1"
        )


def scale_dtype(spec: QuantSpec) -> torch.dtype:
    """Codes below 8 bits keep their scales in bfloat16, as int4 kernels read them."""
    return torch.bfloat16 if spec.bits < 8 else torch.float32


def _store(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Rounded once to the dtype in which it is stored; zero only stands for an empty group."""
    return torch.where(scale.abs() < SMALLEST_SCALE, EMPTY_SCALE, scale).to(scale_dtype(spec))


def storable(scale: Tensor, dtype: torch.dtype, above: bool = False) -> Tensor:
    """Scales as a 16-bit model can store them, in its own dtype: servers and NPU ops that keep
    weight scales in the model's dtype then compute with the numbers that made the codes.

    float32 scales are rounded to it; bfloat16 ones are float16 numbers already, but for very small
    ones. Below float16's normal numbers a scale is a few steps of 2^-24, at least one. There,
    `above` rounds away from zero: for codes that are yet to be made, rounding down by up to a third
    would clip the largest weights.
    """
    is_wider = scale.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    if not is_wider and dtype != torch.float16:
        return scale
    limits = torch.finfo(dtype)
    step = limits.smallest_normal * limits.eps
    steps = scale.float().abs() / step
    steps = (steps.ceil() if above else steps.round()).clamp(min=1.0)
    small = torch.where(scale < 0, -steps, steps) * step
    kept = scale.to(dtype).float() if is_wider else scale.float()
    return torch.where(scale.abs() < limits.smallest_normal, small, kept).to(scale.dtype)


def min_max_scale(weight: Tensor, group_size: int, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point if asymmetric, `[n, k / group_size]`, from each group's range.

    Symmetric: `max|w| / largest`. Asymmetric: `(max - min) / (qmax - qmin)` over a range widened to
    hold zero, `zero_point = round(qmin - min / scale)` with the scale as stored. Of a weight
    `[experts, n, k]`, all of them `[experts, n, k / group_size]`.
    """
    if weight.dim() == 3:
        each = [min_max_scale(matrix, group_size, spec) for matrix in weight]
        zeros = [zero for _, zero in each if zero is not None]
        return torch.stack([scale for scale, _ in each]), torch.stack(zeros) if zeros else None
    low, high = _ranges(weight, group_size)
    if spec.symmetric:
        scale = _store(torch.maximum(-low, high) / spec.format.largest, spec)
        return storable(scale, weight.dtype, above=True), None
    return affine_scale(low, high, spec, weight.dtype)


def _ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest weight of each group, float32 `[n, k / group_size]`."""
    low, high = torch.empty(2, len(weight), weight.shape[1] // group_size)
    for rows in row_slices(weight):
        groups = weight[rows].float().unflatten(1, (-1, group_size))
        low[rows], high[rows] = groups.amin(-1), groups.amax(-1)
    return low, high


def affine_scale(
    low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Scale and int8 zero point that map [low, high], widened to hold zero, onto the codes.

    They are those of a weight of `dtype`, see `storable`.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = storable(
        _store((high - low) / (spec.quant_max - spec.quant_min), spec), dtype, above=True
    )
    zero_point = (spec.quant_min - low / scale.float()).round_()
    return scale, zero_point.clamp_(spec.quant_min, spec.quant_max).to(torch.int8)


def quantize_groups(
    groups: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> Tensor:
    """`groups` `[n, groups, size]` rounded to the grid: float32 values that codes can express."""
    step = scale.float().unsqueeze(-1)
    if not spec.is_integer:
        return spec.format.decode(spec.format.encode(groups / step)).mul_(step)
    codes = (groups / step).round_()
    if zero_point is None:
        return codes.clamp_(spec.quant_min, spec.quant_max).mul_(step)
    zero = zero_point.unsqueeze(-1)
    return codes.add_(zero).clamp_(spec.quant_min, spec.quant_max).sub_(zero).mul_(step)


def weight_codes(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, spec: QuantSpec
) -> Tensor:
    """The codes `[n, k]` of a weight, in the dtype of the spec's format."""
    codes: Tensor
    if spec.is_integer:
        limits = (spec.quant_min, spec.quant_max)
        codes = panguq.quantize_weight(weight, scale, zero_point, group_size, *limits)
    else:
        codes = panguq.encode_weight(weight, scale, group_size, spec.format.name)
    return codes


def weight_values(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> Tensor:
    """The weight `[n, k]` that codes stand for."""
    weight: Tensor
    if spec.is_integer:
        weight = panguq.dequantize_weight(codes, scale, zero_point, group_size, dtype)
    else:
        weight = panguq.decode_weight(codes, scale, group_size, spec.format.name, dtype)
    return weight


def search_scale(
    weight: Tensor,
    group_size: int,
    spec: QuantSpec,
    importance: Tensor | None,
    ratios: tuple[float, ...],
) -> tuple[Tensor, Tensor | None]:
    """The scale (and zero point) of least weighted squared error over a grid of clip ratios.

    Every group chooses for itself: the ratio shrinks its range at both ends, and a symmetric
    4-bit group also chooses which of its ends gets the code -8 (its scale may be negative).
    `importance` `[k]` weighs each input's squared error by how large that input is, the diagonal
    of GPTQ's Hessian; None weighs all alike. Result as `min_max_scale`.
    """
    shape = (len(weight), weight.shape[1] // group_size)
    scale = torch.empty(shape, dtype=scale_dtype(spec))
    zero_point = None if spec.symmetric else torch.empty(shape, dtype=torch.int8)
    for rows in row_slices(weight):
        scale[rows], offset = _search(weight[rows], group_size, spec, importance, ratios)
        if zero_point is not None and offset is not None:
            zero_point[rows] = offset
    return scale, zero_point


def _search(
    weight: Tensor,
    group_size: int,
    spec: QuantSpec,
    importance: Tensor | None,
    ratios: tuple[float, ...],
) -> tuple[Tensor, Tensor | None]:
    """`search_scale` for a few rows."""
    groups = weight.float().unflatten(1, (-1, group_size))
    weighting = None if importance is None else importance.float().reshape(-1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    best: tuple[Tensor, Tensor | None] | None = None
    best_error = torch.full(low.shape, torch.inf)
    plain = min_max_scale(weight, group_size, spec)  # so that the search is never worse
    searched = (
        (storable(scale, weight.dtype, above=True), zero)
        for ratio in ratios
        for scale, zero in _candidates(low * ratio, high * ratio, spec, weight.dtype)
    )
    for candidate in itertools.chain((plain,), searched):
        error = quantize_groups(groups, *candidate, spec).sub_(groups).square_()
        total = (error if weighting is None else error.mul_(weighting)).sum(-1)
        better = total < best_error
        if best is None:
            best, best_error = candidate, total
            continue
        best_error = torch.where(better, total, best_error)
        zero = None
        if candidate[1] is not None and best[1] is not None:
            zero = torch.where(better, candidate[1], best[1])
        best = (torch.where(better, candidate[0], best[0]), zero)
    assert best is not None
    return best


def _candidates(
    low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor | None]]:
    if not spec.symmetric:
        return [affine_scale(low, high, spec, dtype)]
    amax = torch.maximum(low.abs(), high.abs())
    if spec.bits > 4 or not spec.is_integer:
        return [(_store(amax / spec.format.largest, spec), None)]
    # With few codes the one extra negative code is worth having: either end may get it.
    step = amax / -spec.quant_min
    return [(_store(step, spec), None), (_store(-step, spec), None)]
