"""npu_quant_matmul: codes times codes, summed exactly in int32, then scaled.

x2 is stored [k, n]; int4 lies in int32, eight codes a word along the last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from panguq.kernels.ascend.limits import CODES_PER_WORD, W4A8_GROUP
from panguq.kernels.ascend.vendor.dtypes import dtype_of
from panguq.kernels.ascend.vendor.int4pack import unpack_words
from panguq.kernels.ascend.vendor.library import define_npu_op
from panguq.kernels.ascend.vendor.quant_matmul_rules import quant_matmul_contract
from panguq.kernels.ascend.vendor.trans_quant_param import (
    offset_of,
    round_offset,
    scale_bits,
    scale_of,
)
from panguq.kernels.cpu.int8_linear import int32_matmul

# What the int8 x int4 kernel takes off every activation, and `offset` gives back.
SHIFT = 8


def _fake(x1: Tensor, x2: Tensor, output_dtype: int | None) -> Tensor:
    n = x2.shape[-1] * (CODES_PER_WORD if x2.dtype == torch.int32 else 1)
    return x1.new_empty((*x1.shape[:-1], n), dtype=dtype_of(output_dtype, torch.int8))


@define_npu_op(
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None,"
    " Tensor? pertoken_scale=None, Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None,"
    " int? x2_dtype=None, int? pertoken_scale_dtype=None, int? scale_dtype=None,"
    " int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    _fake,
    contract=quant_matmul_contract,
)
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """(x1 @ x2 + int32 bias) * scale * pertoken_scale + float bias, as `output_dtype` [..., n].

    - int8 x int8: x1 int8 [..., k], x2 int8 [k, n]; scale float32, bfloat16 or int64 [n] or [1];
      pertoken_scale float32 [m]; bias int32 (added to the sum) or float (added at the end) [n].
      An int64 scale holds 19 bits of a float32 (`npu_trans_quant_param`); a float32 one is cut to
      them too where torch_npu converts it: float16 or int8 output without pertoken_scale. int8
      output is rounded half to even, then the offset is added (in the int64 scale, or `offset`
      rounded to a whole number), then clamped. int32 output is x1 @ x2 + bias, not scaled.
    - int4 x int4: the same with x1 int32 [m, k / 8] and x2 int32 [k, n / 8].
    - int8 x int4: `_int8_by_int4`.

    Sums are exact, the rest is float32 with one rounding at the end. Formulas: op-plugin's page
    and aclnnQuantMatmulV5.
    """
    output = dtype_of(output_dtype, torch.int8)
    if x1.dtype == torch.int8 and x2.dtype == torch.int32:
        return _int8_by_int4(x1, x2, scale, offset, pertoken_scale).to(output)
    if x1.dtype == torch.int32:
        x1, x2 = unpack_words(x1), unpack_words(x2)
    total = int32_matmul(x1.reshape(-1, x1.shape[-1]), x2.t()).view(*x1.shape[:-1], x2.shape[1])
    if bias is not None and bias.dtype == torch.int32:
        total.add_(bias)
    if output == torch.int32:
        return total
    fixed_scale = pertoken_scale is None and output in (torch.float16, torch.int8)
    # The conversion writes over its own input: a second [m, n] buffer costs more than it does.
    result = total.view(torch.float32).copy_(total).mul_(_scale(scale, fixed_scale))
    if output == torch.int8:
        if offset is not None:
            result.round_().add_(round_offset(offset))
        elif scale.dtype == torch.int64:
            result.round_().add_(offset_of(scale))
        return result.round_().clamp_(-128, 127).to(torch.int8)
    if pertoken_scale is not None:
        result.mul_(pertoken_scale.reshape(*x1.shape[:-1], 1))
    if bias is not None and bias.dtype != torch.int32:
        result.add_(bias)
    return result.to(output)


def _scale(scale: Tensor, fixed: bool) -> Tensor:
    """The scale as float32, as the hardware sees it; `fixed`: what is float32 is cut to 19 bits."""
    if scale.dtype == torch.int64:
        return scale_of(scale)
    scale = scale.to(torch.float32)
    return scale_bits(scale).view(torch.float32) if fixed else scale


def _int8_by_int4(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
) -> Tensor:
    """(sum over groups of 256 inputs (x1 - 8) @ x2 * scale + offset) * pertoken_scale, float32.

    x1 int8 [m, k]; x2 int32 [k, n / 8]; scale int64 [k / 256, n], 19 bits each; offset float32
    [n]; pertoken_scale float32 [m, 1].

    aclnnQuantMatmulV5 documents out = (x1 @ (x2 * x2Scale) + yOffset) * x1Scale and wants
    yOffset = 8 * sum_k x2 * x2Scale, which taken literally would be wrong: the cube core has only
    int4 x int4. Read from ops-nn's kernel (quant_batch_matmul_v4_msd.h): x1 is split into
    16 * high + low + 8, where high = floor(x1 / 16) and low lie in [-8, 7]; the kernel adds up
    16 * high + low = x1 - 8, and yOffset gives the 8 back. A wrong offset is a wrong result, here
    too. The kernel keeps both halves' partial sums in float16, which is not modelled: sums here are
    int32 in a group and float32 over groups.
    """
    weight = unpack_words(x2)
    scales = scale_of(scale)
    shift = torch.full((1, W4A8_GROUP), SHIFT, dtype=torch.int8)
    total = torch.zeros((x1.shape[0], weight.shape[1]), dtype=torch.float32)
    groups = zip(x1.split(W4A8_GROUP, dim=1), weight.split(W4A8_GROUP), scales, strict=True)
    for codes, group_weight, group_scale in groups:
        rows = group_weight.t()
        product = int32_matmul(codes, rows).sub_(int32_matmul(shift, rows))
        total.add_(product.to(torch.float32).mul_(group_scale))
    if offset is not None:
        total.add_(offset)
    return total if pertoken_scale is None else total.mul_(pertoken_scale)
