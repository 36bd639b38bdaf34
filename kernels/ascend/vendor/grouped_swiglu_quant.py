"""npu_grouped_matmul_swiglu_quant_v2: gate and up projection of all experts, and their product
quantized for the next matmul."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    PANGUQ,
    Broken,
    Size,
    names,
    not_given,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.grouped_matmul import int8_by_int4, rows_of_experts
from panguq.kernels.ascend.vendor.grouped_matmul_rules import COUNTS, CUMULATIVE, LARGEST_GROUPS
from panguq.kernels.ascend.vendor.library import define_npu_op
from panguq.kernels.ascend.vendor.moe_routing import unwritten
from panguq.kernels.cpu.int8_linear import int32_matmul

LARGEST_N = 10240
SMALLEST_REFUSED_K = {torch.int8: 65536, torch.int32: 20000}
_DOCS = OP_PLUGIN.format("npu_grouped_matmul_swiglu_quant_v2")
_ACLNN = "aclnnGroupedMatmulSwigluQuantWeightNzV2"


def _contract(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    smooth_scale: Tensor | None,
    weight_assist_matrix: Sequence[Tensor] | None,
    bias: Tensor | None,
    dequant_mode: int | None,
    dequant_dtype: int | None,
    quant_mode: int | None,
    quant_dtype: int | None,
    group_list_type: int | None,
    tuning_config: Sequence[int] | None,
    x_dtype: int | None,
    weight_dtype: int | None,
    weight_scale_dtype: int | None,
    x_scale_dtype: int | None,
) -> Iterator[Broken]:
    unused = {
        "smooth_scale": smooth_scale, "bias": bias, "tuning_config": tuning_config,
        "x_dtype": x_dtype, "weight_dtype": weight_dtype, "x_scale_dtype": x_scale_dtype,
        "weight_scale_dtype": weight_scale_dtype,
    }  # fmt: skip
    yield from not_given(unused, PANGUQ)
    for name, value, default in (
        ("dequant_mode", dequant_mode, 0),
        ("dequant_dtype", dequant_dtype, dtype_number(torch.float32)),
        ("quant_mode", quant_mode, 0),
        ("quant_dtype", quant_dtype, dtype_number(torch.int8)),
    ):
        if value != default:
            yield Broken(f"{name} must be {default}, its default, not {value}", PANGUQ)
    for name, tensors in (("weight", weight), ("weight_scale", weight_scale)):
        if len(tensors) != 1:
            yield Broken(f"{name} must be a list of one tensor, not of {len(tensors)}", _DOCS)
            return
    yield from wrong_dtype("x", x, (torch.int8,), _DOCS)
    yield from wrong_dtype("weight", weight[0], (torch.int8, torch.int32), _DOCS)
    if x.dim() != 2 or weight[0].dim() != 3:
        yield Broken(
            "x must have shape [rows, k] and weight [experts, k, n], not"
            f" {list(x.shape)} and {list(weight[0].shape)}",
            _ACLNN,
        )
        return
    packed = weight[0].dtype == torch.int32
    experts, k = weight[0].shape[0], x.shape[1]
    n = weight[0].shape[2] * (CODES_PER_WORD if packed else 1)
    yield from _sizes(x, weight[0], k, n)
    if group_list_type not in (CUMULATIVE, COUNTS):
        yield Broken(f"group_list_type must be 0 or 1, not {group_list_type}", _DOCS)
    yield from wrong_dtype("group_list", group_list, (torch.int64,), _DOCS)
    yield from wrong_shape("group_list", group_list, [[experts]], _DOCS)
    yield from wrong_dtype("x_scale", x_scale, (torch.float32,), _DOCS)
    yield from wrong_shape("x_scale", x_scale, [[x.shape[0]]], _DOCS)
    floats = (torch.float32, torch.float16, torch.bfloat16)
    legal = (torch.int64,) if packed else floats
    source = f"{_ACLNN}, for {names([weight[0].dtype])} weights"
    yield from wrong_dtype("weight_scale", weight_scale[0], legal, source)
    yield from wrong_shape("weight_scale", weight_scale[0], [[experts, n]], _ACLNN)
    if not packed:
        yield from not_given({"weight_assist_matrix": weight_assist_matrix}, source)
    elif weight_assist_matrix is None or len(weight_assist_matrix) != 1:
        yield Broken("weight_assist_matrix must be a list of one tensor", source)
    else:
        assist = weight_assist_matrix[0]
        yield from wrong_dtype("weight_assist_matrix", assist, (torch.float32,), source)
        yield from wrong_shape("weight_assist_matrix", assist, [[experts, n]], source)


def _sizes(x: Tensor, weight: Tensor, k: Size, n: Size) -> Iterator[Broken]:
    if surely(weight.shape[1] != k):
        yield Broken(f"x's k {k} must equal weight's k {weight.shape[1]}", _DOCS)
    if surely(weight.shape[0] > LARGEST_GROUPS):
        yield Broken(
            f"there may be at most {LARGEST_GROUPS} experts, not {weight.shape[0]}", _ACLNN
        )
    if surely(n > LARGEST_N) or surely(n % 2 != 0):
        yield Broken(f"n must be even and at most {LARGEST_N}, not {n}", _ACLNN)
    refused = SMALLEST_REFUSED_K.get(weight.dtype)
    if refused is not None and surely(k >= refused):
        yield Broken(f"k must be less than {refused}, not {k}", _ACLNN)


def _fake(x: Tensor, weight_scale: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    half = weight_scale[0].shape[-1] // 2
    codes = x.new_empty((x.shape[0], half), dtype=torch.int8)
    return codes, x.new_empty((x.shape[0],), dtype=torch.float32)


@define_npu_op(
    "npu_grouped_matmul_swiglu_quant_v2(Tensor x, Tensor[] weight, Tensor[] weight_scale,"
    " Tensor x_scale, Tensor group_list, *, Tensor? smooth_scale=None,"
    " Tensor[]? weight_assist_matrix=None, Tensor? bias=None, int? dequant_mode=0,"
    " int? dequant_dtype=6, int? quant_mode=0, int? quant_dtype=1, int? group_list_type=0,"
    " int[]? tuning_config=None, int? x_dtype=None, int? weight_dtype=None,"
    " int? weight_scale_dtype=None, int? x_scale_dtype=None) -> (Tensor, Tensor)",
    _fake,
    contract=_contract,
)
def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    smooth_scale: Tensor | None = None,
    weight_assist_matrix: Sequence[Tensor] | None = None,
    bias: Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes int8 [rows, n / 2] and scale float32 [rows] of silu(gate) * up, by expert.

    [gate, up] = x @ weight * x_scale * weight_scale: x int8 [rows, k] sorted by expert (group_list
    int64 [experts], ends or counts), x_scale float32 [rows]; weight int8 [experts, k, n] in
    FRACTAL_NZ with float scales [experts, n], or int32 [experts, k, n / 8] with int64 ones and
    weight_assist_matrix = 8 * sum_k weight * scale (`int8_by_int4`). Rows of no expert are not
    written.

    Unlike npu_swiglu and npu_dynamic_quant one after the other, nothing is rounded to 16 bits
    before the scale, max / 127, is found; then v * (1 / scale) is rounded half to even twice,
    to float16 and to int8, as CANN's kernel does: about one code in a hundred differs by one from
    a single rounding. A row of zeros, on which nothing is written, gets codes of zero here.
    """
    half = weight_scale[0].shape[-1] // 2
    codes = unwritten(torch.empty((x.shape[0], half), dtype=torch.int8))
    scales = unwritten(torch.empty(x.shape[0]))
    for expert, rows in rows_of_experts(group_list, group_list_type):
        own, scale = weight[0][expert], weight_scale[0][expert]
        if weight_assist_matrix is not None:
            assist = weight_assist_matrix[0][expert]
            both = int8_by_int4(x[rows], own, scale, assist, x_scale[rows])
        else:
            both = int32_matmul(x[rows], own.t()).to(torch.float32)
            both.mul_(x_scale[rows].unsqueeze(-1)).mul_(scale.to(torch.float32))
        gate, up = both.chunk(2, -1)
        product = torch.nn.functional.silu(gate).mul_(up)
        scales[rows] = product.abs().amax(-1) / 127
        scaled = (product * scales[rows].reciprocal().unsqueeze(-1)).nan_to_num_(0.0)
        codes[rows] = scaled.to(torch.float16).round_().to(torch.int8)
    return codes, scales
