"""Any weight-only matmul on a CPU: dequantize the weight piece by piece, then multiply in float.

It takes every shape, group size and bit width, so it is what matmuls fall back to; and in
float32 it is the exact counterpart of the kernels that compute in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panguq.ir.opset import define_op
from panguq.kernels.packing import unpack_int4
from panguq.kernels.quantize import dequantize_weight

NAMESPACE = "panguq_cpu"
# A piece and its dequantized copy stay in the second-level cache between the two steps.
WEIGHTS_PER_PIECE = 1 << 17


def _fake_dequantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
) -> Tensor:
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
    """x @ ((codes - zero_point) * scale).T + bias, multiplied in `compute_dtype`.

    x float [..., k]; codes int8 [n, k], or uint8 [n, k / 2] as `pack_int4` packs; scale float
    [n, k / group_size]; zero_point integer of the same shape or None; bias float [n] or None.
    Returns [..., n] in x's dtype.
    """
    tokens, rows = x.to(compute_dtype), max(1, WEIGHTS_PER_PIECE // x.shape[-1])
    pieces = []
    for start in range(0, codes.shape[0], rows):
        piece = slice(start, start + rows)
        values = unpack_int4(codes[piece]) if codes.dtype == torch.uint8 else codes[piece]
        offset = None if zero_point is None else zero_point[piece]
        weight = dequantize_weight(values, scale[piece], offset, group_size, compute_dtype)
        pieces.append(F.linear(tokens, weight))
    result = torch.cat(pieces, dim=-1).to(x.dtype)
    return result if bias is None else result.add_(bias)


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
