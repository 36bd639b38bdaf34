"""Quantize and dequantize: activations per tensor or token, weights per channel or group, caches.

All arithmetic is float32, whatever the input's dtype, and rounds half to even. A NaN gives an
unspecified code. Activations are multiplied by the reciprocal of their scale, as integer NPU
kernels do; weights, which are quantized once, are divided.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from panguq.ir.ops.opset import define_op
from panguq.tensors.row_slices import each_matrix, row_slices

# Below this a token counts as zero: its scale stays normal and so does the reciprocal.
SMALLEST_AMAX = 1e-30


def _fake_quantize_per_tensor(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)


@define_op(
    "quantize_per_tensor(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max)"
    " -> Tensor",
    fake=_fake_quantize_per_tensor,
)
def quantize_per_tensor(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """clamp(round(x * (1 / scale) + zero_point), quant_min, quant_max).

    x float [...]; scale float32 [1]; zero_point int32 [1]. Returns int8 [...]; an infinity
    becomes the nearest bound. The factor 1 / scale is rounded to x's dtype, in which NPU kernels
    take it, and the zero point is added before rounding, as they do.
    """
    factor = scale.reciprocal().to(x.dtype).to(scale.dtype)
    codes = (x.contiguous() * factor).add_(zero_point).round_()
    return codes.clamp_(quant_min, quant_max).to(torch.int8)


def _fake_quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@define_op(
    "quantize_per_token(Tensor x, int quant_max, float clip=1.0) -> (Tensor codes, Tensor scale)",
    fake=_fake_quantize_per_token,
)
def quantize_per_token(x: Tensor, quant_max: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale = clip * max(amax|x|, 1e-30) / quant_max; codes = round(x * (1 / scale)), per last dim.

    x float [..., k], 1 <= quant_max <= 127, 0 < clip <= 1. Returns int8 [..., k] and float32
    [..., 1]. Codes beyond +-quant_max become that; with a clip of 1 there are none by construction,
    since the rounding error of the reciprocal is far below a half. A zero token gives zero codes.
    The scale of a token with a NaN or an infinity is NaN or infinite, so that dequantizing gives
    NaN and the fault is seen.
    """
    x = x.contiguous().to(torch.float32)
    scale = x.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST_AMAX).div_(quant_max)
    if clip != 1.0:
        scale.mul_(clip)
    codes = (x * scale.reciprocal()).round_()
    if clip != 1.0:
        codes.clamp_(-quant_max, quant_max)
    return codes.to(torch.int8), scale


def _fake_quantize_per_channel(x: Tensor, scale: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, scale.shape)
    return x.new_empty(shape, dtype=torch.int8)


@define_op(
    "quantize_per_channel(Tensor x, Tensor scale, int quant_max) -> Tensor",
    fake=_fake_quantize_per_channel,
)
def quantize_per_channel(x: Tensor, scale: Tensor, quant_max: int) -> Tensor:
    """clamp(round(x * (1 / scale)), -quant_max, quant_max), in float32, half to even.

    x float `[batch, heads, seq, d]`; scale float32 `[heads, 1, d]`, not zero; 1 <= quant_max <=
    127. Returns int8 of x's shape. A NaN gives an unspecified code.
    """
    codes = (x.contiguous().to(torch.float32) * scale.reciprocal()).round_()
    return codes.clamp_(-quant_max, quant_max).to(torch.int8)


def _fake_dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    shape = torch.broadcast_shapes(codes.shape, scale.shape)
    return codes.new_empty(shape, dtype=dtype)


@define_op(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, ScalarType dtype) -> Tensor",
    fake=_fake_dequantize,
)
def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(codes - zero_point) * scale, broadcasting, computed in float32 and returned as `dtype`.

    codes int8 [...]; scale float, zero_point integer or None, of a shape that broadcasts.
    """
    values = codes.contiguous().to(torch.float32)
    if zero_point is not None:
        values = values - zero_point
    return (values * scale.to(torch.float32)).to(dtype)


def _fake_quantize_weight(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.int8)


@define_op(
    "quantize_weight(Tensor weight, Tensor scale, Tensor? zero_point, int group_size,"
    " int quant_min, int quant_max) -> Tensor",
    fake=_fake_quantize_weight,
)
def quantize_weight(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """clamp(round(weight / scale) + zero_point, quant_min, quant_max), one scale per group.

    weight float [n, k]; scale float [n, k / group_size], not zero (a negative one flips the codes);
    zero_point integer of the same shape, or None for 0; group_size == k is per channel. Returns
    int8 [n, k]. All of them may be stacked: [experts, n, k].
    """
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    if weight.dim() == 3:
        grid = (group_size, quant_min, quant_max)
        return each_matrix(lambda *t: quantize_weight(*t, *grid), codes, weight, scale, zero_point)
    for rows in row_slices(weight):
        groups = weight[rows].to(torch.float32).unflatten(1, (-1, group_size))
        rounded = groups.div(scale[rows].to(torch.float32).unsqueeze(-1)).round_()
        if zero_point is not None:
            rounded.add_(zero_point[rows].unsqueeze(-1))
        codes[rows] = rounded.clamp_(quant_min, quant_max).flatten(1)
    return codes


def _fake_dequantize_weight(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@define_op(
    "dequantize_weight(Tensor codes, Tensor scale, Tensor? zero_point, int group_size,"
    " ScalarType dtype) -> Tensor",
    fake=_fake_dequantize_weight,
)
def dequantize_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """(codes - zero_point) * scale, one scale per group of `group_size` inputs.

    codes int8 [n, k]; scale float [n, k / group_size]; zero_point integer of the same shape, or
    None for 0. Computed in float32, returned as `dtype` [n, k].
    All may be stacked: [experts, n, k].
    """
    weight = codes.new_empty(codes.shape, dtype=dtype)
    if codes.dim() == 3:
        of_one = functools.partial(dequantize_weight, group_size=group_size, dtype=dtype)
        return each_matrix(of_one, weight, codes, scale, zero_point)
    for rows in row_slices(codes):
        groups = codes[rows].to(torch.float32).unflatten(1, (-1, group_size))
        if zero_point is not None:
            groups.sub_(zero_point[rows].unsqueeze(-1))
        weight[rows] = groups.mul_(scale[rows].to(torch.float32).unsqueeze(-1)).flatten(1)
    return weight
