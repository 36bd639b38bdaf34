"""Any weight-only matmul on a CPU: dequantize the weight piece by piece, then multiply in float.

It takes every shape, group size and bit width, so it is what matmuls fall back to; and in
float32 it is the exact counterpart of the kernels that compute in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panguq.ir.ops.opset import define_op
from panguq.ir.ops.packing import unpack_int4
from panguq.ir.ops.quantize import dequantize_weight
from panguq.kernels.cpu.multiplying import multiplying_dtype

NAMESPACE = "panguq_cpu"
# What is dequantized at a time: 1 MiB in float32. Smaller pieces spend more on starting ops.
WEIGHTS_PER_STEP = 1 << 18
# What is multiplied at a time: 2 MiB in bfloat16, memory that the allocator gives out again and
# again. A whole large weight would be mapped anew at every call, which costs more than filling it.
WEIGHTS_PER_PIECE = 1 << 20


def _fake_dequantized_linear(x: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@define_op(
    "dequantized_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point,"
    " int group_size, Tensor? bias, ScalarType compute_dtype) -> Tensor",
    fake=_fake_dequantized_linear,
    namespace=NAMESPACE,
)
def dequantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
) -> Tensor:
    """x @ ((codes - zero_point) * scale).T + bias, multiplied in `compute_dtype`, or
    in float32 where that is bfloat16 and float32 is faster.

    x float [..., k]; codes int8 [n, k], or uint8 [n, k / 2] as `pack_int4` packs; scale float
    [n, k / group_size]; zero_point integer of the same shape or None; bias float [n] or None.
    Returns [..., n] in x's dtype.
    """
    return dequantize_and_multiply(x, codes, scale, zero_point, group_size, bias, compute_dtype)


def dequantize_and_multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
) -> Tensor:
    """`dequantized_linear` as a plain function, for ops that do the same beyond a few tokens."""
    n, k = codes.shape[0], x.shape[-1]
    compute_dtype = multiplying_dtype(compute_dtype)
    tokens, rows = x.to(compute_dtype), min(n, max(1, WEIGHTS_PER_PIECE // k))
    weight = torch.empty((rows, k), dtype=compute_dtype)
    result = x.new_empty((*x.shape[:-1], n))
    for start in range(0, n, rows):
        piece = slice(start, min(n, start + rows))
        offset = None if zero_point is None else zero_point[piece]
        part = weight[: piece.stop - start]
        _dequantize_into(part, codes[piece], scale[piece], offset, group_size)
        result[..., piece] = F.linear(tokens, part)
    return result if bias is None else result.add_(bias)


def _dequantize_into(
    weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int
) -> None:
    rows = max(1, WEIGHTS_PER_STEP // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        step = slice(start, start + rows)
        values = unpack_int4(codes[step]) if codes.dtype == torch.uint8 else codes[step]
        offset = None if zero_point is None else zero_point[step]
        weight[step] = dequantize_weight(values, scale[step], offset, group_size, torch.float32)


def reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """What every weight-only op approximates, in float64."""
    values = unpack_int4(codes) if codes.dtype == torch.uint8 else codes
    groups = values.to(torch.float64).view(values.shape[0], -1, group_size)
    offset = 0 if zero_point is None else zero_point.unsqueeze(-1)
    weight = ((groups - offset) * scale.to(torch.float64).unsqueeze(-1)).flatten(1)
    result = x.to(torch.float64) @ weight.t()
    return (result if bias is None else result + bias).to(x.dtype)
