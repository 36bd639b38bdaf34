"""The scale and zero point of a tensor whose range is known."""

from __future__ import annotations

import torch

from panguq.ir.quant_spec import QuantSpec

SMALLEST_RANGE = 1e-12


def affine(
    low: float, high: float, spec: QuantSpec, dtype: torch.dtype = torch.float32
) -> tuple[float, int]:
    """Scale and zero point that map [low, high] of a tensor of `dtype` onto the codes of `spec`."""
    if spec.symmetric:
        return storable_scale(max(-low, high, SMALLEST_RANGE) / spec.quant_max, dtype), 0
    low, high = min(low, 0.0), max(high, 0.0)
    width = max(high - low, SMALLEST_RANGE)
    scale = storable_scale(width / (spec.quant_max - spec.quant_min), dtype)
    zero_point = round(spec.quant_min - low / scale)
    return scale, min(max(zero_point, spec.quant_min), spec.quant_max)


def storable_scale(scale: float, dtype: torch.dtype) -> float:
    """A scale that a model of this dtype can store, at most three steps of the dtype above `scale`.

    NPU kernels and servers keep a 16-bit model's scale s and its reciprocal r in its own dtype, so
    that codes are made with r and read with s: of the three values the one of least |s * r - 1|.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return scale
    least = 1 / 2**15 if dtype == torch.float16 else 0.0  # its reciprocal must not overflow
    values = [torch.tensor(max(scale, least), dtype=dtype)]
    for _ in range(2):
        values.append(torch.nextafter(values[-1], torch.tensor(torch.inf, dtype=dtype)))
    return min((float(s) for s in values), key=lambda s: _gain_error(s, dtype))


def _gain_error(scale: float, dtype: torch.dtype) -> float:
    reciprocal = torch.tensor(scale).reciprocal().to(dtype)
    return abs(scale * float(reciprocal) - 1.0)
