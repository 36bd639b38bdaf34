"""Quantize and dequantize in a number format, which the call names.

Integers have ops of their own, with bounds and zero points: see `quantize.py`. Arithmetic is
float32, whatever the input's dtype, and what is encoded is divided by its scale.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from panguq.ir.number_format import find_number_format
from panguq.ir.ops.opset import define_op
from panguq.ir.ops.quantize import SMALLEST_AMAX
from panguq.tensors.row_slices import each_matrix, row_slices


def _fake_encode_per_token(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(
        x, dtype=find_number_format(format).storage, memory_format=torch.contiguous_format
    )
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@define_op(
    "encode_per_token(Tensor x, str format) -> (Tensor codes, Tensor scale)",
    fake=_fake_encode_per_token,
)
def encode_per_token(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """scale = max(amax|x|, 1e-30) / largest; codes = encode(x / scale), per last dim.

    x float [..., k]. Returns codes [..., k] in the format's dtype and float32 [..., 1]. The scale
    of a token with a NaN or an infinity is NaN or infinite, so that decoding gives NaN.
    """
    known = find_number_format(format)
    x = x.contiguous().to(torch.float32)
    scale = x.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST_AMAX).div_(known.largest)
    return known.encode(x / scale), scale


def _fake_decode_per_token(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(torch.broadcast_shapes(codes.shape, scale.shape), dtype=dtype)


@define_op(
    "decode_per_token(Tensor codes, Tensor scale, str format, ScalarType dtype) -> Tensor",
    fake=_fake_decode_per_token,
)
def decode_per_token(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """decode(codes) * scale, broadcasting, computed in float32 and returned as `dtype`.

    codes [...] in the format's dtype; scale float, of a shape that broadcasts.
    """
    values = find_number_format(format).decode(codes.contiguous())
    return (values * scale.to(torch.float32)).to(dtype)


def _fake_encode_weight(weight: Tensor, format: str) -> Tensor:
    return weight.new_empty(weight.shape, dtype=find_number_format(format).storage)


@define_op(
    "encode_weight(Tensor weight, Tensor scale, int group_size, str format) -> Tensor",
    fake=_fake_encode_weight,
)
def encode_weight(weight: Tensor, scale: Tensor, group_size: int, format: str) -> Tensor:
    """encode(weight / scale), one scale per group of `group_size` inputs.

    weight float [n, k]; scale float [n, k / group_size], not zero. Returns codes [n, k] in the
    format's dtype. All may be stacked: [experts, n, k].
    """
    known = find_number_format(format)
    codes = weight.new_empty(weight.shape, dtype=known.storage)
    if weight.dim() == 3:
        of_one = functools.partial(encode_weight, group_size=group_size, format=format)
        return each_matrix(of_one, codes, weight, scale)
    for rows in row_slices(weight):
        groups = weight[rows].to(torch.float32).unflatten(1, (-1, group_size))
        codes[rows] = known.encode(groups.div(scale[rows].to(torch.float32)[..., None])).flatten(1)
    return codes


def _fake_decode_weight(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@define_op(
    "decode_weight(Tensor codes, Tensor scale, int group_size, str format, ScalarType dtype)"
    " -> Tensor",
    fake=_fake_decode_weight,
)
def decode_weight(
    codes: Tensor, scale: Tensor, group_size: int, format: str, dtype: torch.dtype
) -> Tensor:
    """decode(codes) * scale, one scale per group of `group_size` inputs.

    codes [n, k] in the format's dtype; scale float [n, k / group_size]. Computed in float32,
    returned as `dtype` [n, k]. All may be stacked: [experts, n, k].
    """
    known = find_number_format(format)
    weight = codes.new_empty(codes.shape, dtype=dtype)
    if codes.dim() == 3:
        same = dict(group_size=group_size, format=format, dtype=dtype)
        return each_matrix(functools.partial(decode_weight, **same), weight, codes, scale)
    for rows in row_slices(codes):
        groups = known.decode(codes[rows]).unflatten(1, (-1, group_size))
        weight[rows] = groups.mul(scale[rows].to(torch.float32)[..., None]).flatten(1)
    return weight
