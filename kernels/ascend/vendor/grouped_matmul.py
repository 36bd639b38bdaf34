"""npu_grouped_matmul: the rows of each expert times that expert's weight.

Weights are stored [experts, k, n]; int4 lies in int32, eight codes a word along n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.vendor.dtypes import dtype_of
from panguq.kernels.ascend.vendor.grouped_matmul_rules import (
    COUNTS,
    CUMULATIVE,
    Tensors,
    grouped_matmul_contract,
)
from panguq.kernels.ascend.vendor.int4pack import unpack_words
from panguq.kernels.ascend.vendor.library import define_npu_op
from panguq.kernels.ascend.vendor.moe_routing import unwritten
from panguq.kernels.ascend.vendor.weight_quant_matmul import antiquantize
from panguq.kernels.cpu.int8_linear import int32_matmul

Rows = tuple[int, slice]


def rows_of_experts(group_list: Tensor, kind: int | None) -> list[Rows]:
    """Each expert that has rows, with them: from ends, counts or pairs (`group_list_type`)."""
    if kind == CUMULATIVE:
        counts = torch.diff(group_list, prepend=group_list.new_zeros(1)).tolist()
        pairs = list(enumerate(counts))
    elif kind == COUNTS:
        pairs = list(enumerate(group_list.tolist()))
    else:
        pairs = [(expert, count) for expert, count in group_list.tolist()]
    found, start = [], 0
    for expert, count in pairs:
        if count > 0:
            found.append((expert, slice(start, start + count)))
        start += count
    return found


def full_scales(scale: Tensor) -> Tensor:
    """int64 [...] -> float32 [...]: all 32 bits of the float32 in the low half."""
    return scale.contiguous().view(torch.int32).unflatten(-1, (-1, 2))[..., 0].view(torch.float32)


def _fake(x: Sequence[Tensor], weight: Sequence[Tensor], output_dtype: int | None) -> list[Tensor]:
    packed = CODES_PER_WORD if weight[0].dtype == torch.int32 else 1
    n = weight[0].shape[2] * packed
    return [x[0].new_empty((x[0].shape[0], n), dtype=dtype_of(output_dtype, x[0].dtype))]


@define_npu_op(
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None,"
    " Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None,"
    " Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None,"
    " Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None,"
    " int? split_item=0, int? group_type=None, int? group_list_type=0, int? act_type=0,"
    " int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None,"
    " int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None) -> Tensor[]",
    _fake,
    contract=grouped_matmul_contract,
)
def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Tensors = None,
    scale: Tensors = None,
    offset: Tensors = None,
    antiquant_scale: Tensors = None,
    antiquant_offset: Tensors = None,
    per_token_scale: Tensors = None,
    group_list: Tensor | None = None,
    activation_input: Tensors = None,
    activation_quant_scale: Tensors = None,
    activation_quant_offset: Tensors = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """[x @ weight of the expert that a row belongs to], `[rows, n]` as `output_dtype`.

    Every list holds one tensor: x [rows, k], sorted by expert; group_list int64 tells whose they
    are (`rows_of_experts`); scales and biases [experts, n]. Rows of no expert are not written.

    - float: x @ weight + bias, summed in float32.
    - 16-bit x, int8 weight or int32 [experts, k, n / 8]: x @ ((weight + antiquant_offset) *
      antiquant_scale) + bias, the weight rounded to x's dtype; 4-bit scales may be [experts,
      groups, n]. For much of large matrices CANN splits x into two int8 parts instead.
    - int8 x int8: (x @ weight + int32 bias) * scale * per_token_scale [rows] + bfloat16 bias;
      int32 output is the sum and the bias alone.
    - int8 x int4: `int8_by_int4`, scale [experts, groups, n]. vllm-ascend, where it does not call
      the fused op, gives [experts, n], which this body reads as one group and the contract refuses:
      CANN's tiling takes groups from dimension 1 and n from dimension 2.

    Integer sums are exact, the rest is float32 with one rounding at the end. Formulas and tables:
    op-plugin's page and aclnnGroupedMatmulV5.
    """
    assert group_list is not None
    n = weight[0].shape[2] * (CODES_PER_WORD if weight[0].dtype == torch.int32 else 1)
    result = torch.empty((x[0].shape[0], n), dtype=dtype_of(output_dtype, x[0].dtype))
    unwritten(result)
    per_token = None if per_token_scale is None else per_token_scale[0]
    for expert, rows in rows_of_experts(group_list, group_list_type):
        result[rows] = _one_expert(
            x[0][rows],
            weight[0][expert],
            _own(bias, expert),
            _own(scale, expert),
            _own(antiquant_scale, expert),
            _own(antiquant_offset, expert),
            None if per_token is None else per_token[rows],
            result.dtype,
        )
    return [result]


def _own(tensors: Tensors, expert: int) -> Tensor | None:
    return None if tensors is None else tensors[0][expert]


def _one_expert(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    antiquant_scale: Tensor | None,
    antiquant_offset: Tensor | None,
    per_token: Tensor | None,
    output: torch.dtype,
) -> Tensor:
    if x.dtype == torch.int8 and weight.dtype == torch.int32:
        assert scale is not None and bias is not None and per_token is not None
        return int8_by_int4(x, weight, scale, bias, per_token)
    if x.dtype == torch.int8:
        return _int8_by_int8(x, weight, bias, scale, per_token, output)
    if antiquant_scale is not None:
        codes = unpack_words(weight) if weight.dtype == torch.int32 else weight
        grouped = antiquant_scale.dim() == 2
        group_size = codes.shape[0] // antiquant_scale.shape[0] if grouped else 0
        weight = antiquantize(codes, antiquant_scale, antiquant_offset, group_size, x.dtype)
    result = x.to(torch.float32) @ weight.to(torch.float32)
    return result if bias is None else result.add_(bias)


def _int8_by_int8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    per_token: Tensor | None,
    output: torch.dtype,
) -> Tensor:
    total = int32_matmul(x, weight.t())
    if bias is not None and bias.dtype == torch.int32:
        total = total + bias
    if output == torch.int32:
        return total
    assert scale is not None
    result = total.to(torch.float32) * scale.to(torch.float32)
    if per_token is not None:
        result.mul_(per_token.unsqueeze(-1))
    return result if bias is None or bias.dtype == torch.int32 else result.add_(bias)


def int8_by_int4(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, per_token: Tensor
) -> Tensor:
    """(sum over groups ((x - 8) @ weight) * scale + bias) * per_token, float32 `[m, n]`.

    x int8 [m, k]; weight int32 [k, n / 8]; scale int64 [groups, n], or [n] for one group, a float32
    in the low half of each; bias float32 [n] = 8 * sum_k weight * scale; per_token float32 [m].

    The cube core multiplies int4 only: CANN's kernel splits x into 16 * high + low + 8, and `bias`
    gives the 8 back; a wrong bias is a wrong result. Not modelled: that kernel keeps both halves'
    scaled sums in float16; and with one group and n / (mean rows an expert) up to 4 another kernel
    runs, which widens the weight to int8, reads no bias, and for bfloat16 results rounds the scale
    down to bfloat16. Both agree where the bias is that sum and the scale a bfloat16 number.
    """
    codes, scale = unpack_words(weight), scale.reshape(-1, scale.shape[-1])
    group = codes.shape[0] // scale.shape[0]
    shift = torch.full((1, group), 8, dtype=torch.int8)
    total = torch.zeros((x.shape[0], codes.shape[1]), dtype=torch.float32)
    for part, own, own_scale in zip(
        x.split(group, dim=1), codes.split(group), full_scales(scale), strict=True
    ):
        product = int32_matmul(part, own.t()).sub_(int32_matmul(shift, own.t()))
        total.add_(product.to(torch.float32).mul_(own_scale))
    return total.add_(bias).mul_(per_token.unsqueeze(-1))
