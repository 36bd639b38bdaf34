"""npu_weight_quant_batchmatmul: 16-bit activations times int8 or int4 weights (W8A16, W4A16)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    PANGUQ,
    Broken,
    Size,
    names,
    not_contiguous,
    not_given,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.int4pack import unpack_words
from panguq.kernels.ascend.vendor.library import define_npu_op

GROUP_MULTIPLE = 32
BIAS_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float16}
_DOCS = OP_PLUGIN.format("npu_weight_quant_batchmatmul")
_HOST = "torch_npu's host code for npu_weight_quant_batchmatmul"
_ACLNN = "aclnnWeightQuantBatchMatmulV2"


def _contract(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    bias: Tensor | None,
    antiquant_group_size: int,
    inner_precise: int,
    weight_dtype: int | None,
    chip: Chip,
) -> Iterator[Broken]:
    unused = {"quant_scale": quant_scale, "quant_offset": quant_offset}
    yield from not_given({**unused, "weight_dtype": weight_dtype}, PANGUQ)
    if inner_precise != 0:
        yield Broken(f"inner_precise must be 0, the exact mode, not {inner_precise}", PANGUQ)
    yield from wrong_dtype("x", x, tuple(BIAS_DTYPE), _DOCS)
    yield from wrong_dtype("weight", weight, (torch.int8, torch.int32), _DOCS)
    if x.dim() != 2 or weight.dim() != 2:
        yield Broken(
            f"x and weight must have 2 dimensions, not {x.dim()} and {weight.dim()}", _DOCS
        )
        return
    m, k = x.shape
    n = weight.shape[1] * (CODES_PER_WORD if weight.dtype == torch.int32 else 1)
    if surely(k != weight.shape[0]):
        yield Broken(f"x's k {k} must equal weight's k {weight.shape[0]}", _HOST)
    if surely(m < 1):
        yield Broken(f"m must be at least 1, not {m}", _ACLNN)
    largest = chip.largest_dimension
    for what, size in (("k", k), ("n", n)):
        if surely(size < 1) or surely(size > largest):
            yield Broken(f"{what} must be from 1 to {largest}, not {size}", _ACLNN)
    if weight.dtype == torch.int32:
        # The page also allows the transposed view of a contiguous [n, k / 8].
        yield from not_contiguous("weight", weight, PANGUQ)
    group = antiquant_group_size
    if group and (group % GROUP_MULTIPLE or group < GROUP_MULTIPLE or surely(group > k - 1)):
        yield Broken(
            f"antiquant_group_size must be 0 or a multiple of {GROUP_MULTIPLE} from"
            f" {GROUP_MULTIPLE} to k - 1 = {k - 1}, not {group}",
            _HOST,
        )
    # The page has int64 scales too, for float16 and a transposed int8 weight.
    if antiquant_scale.dtype != x.dtype:
        yield Broken(f"antiquant_scale must have x's dtype {names([x.dtype])}", _DOCS)
    shapes: Sequence[Sequence[Size]] = [[n], [1, n], [1], [1, 1]]
    if group > 0:
        shapes = [[(k + group - 1) // group, n]]
    yield from wrong_shape("antiquant_scale", antiquant_scale, shapes, _DOCS)
    yield from wrong_shape("antiquant_offset", antiquant_offset, [antiquant_scale.shape], _DOCS)
    yield from wrong_dtype("antiquant_offset", antiquant_offset, (antiquant_scale.dtype,), _DOCS)
    if bias is not None:
        if x.dtype in BIAS_DTYPE:
            source = f"{_DOCS}, for {names([x.dtype])} activations"
            yield from wrong_dtype("bias", bias, (BIAS_DTYPE[x.dtype],), source)
        yield from wrong_shape("bias", bias, [[n], [1, n]], _DOCS)
        yield from not_contiguous("bias", bias, _DOCS)


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    n = weight.shape[1] * (CODES_PER_WORD if weight.dtype == torch.int32 else 1)
    return x.new_empty((x.shape[0], n))


def antiquantize(
    codes: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """(codes + offset) * scale in `dtype`: int8 [k, n] -> [k, n].

    scale and offset have that dtype and shape [n], [1, n], [1] or, grouped, [ceil(k / g), n]. For
    whole offsets of at most 128 the sum is exact, so that the weight is rounded once; the formula
    is op-plugin's, which leaves open how others are rounded: here the sum is, too.
    """
    weight = codes.to(dtype)
    if group_size:
        k = codes.shape[0]
        # The last group may be short.
        scale = scale.repeat_interleave(group_size, dim=0)[:k]
        offset = None if offset is None else offset.repeat_interleave(group_size, dim=0)[:k]
    if offset is not None:
        weight.add_(offset)
    return weight.mul_(scale)


@define_npu_op(
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale,"
    " Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None,"
    " Tensor? bias=None, int antiquant_group_size=0, int inner_precise=0,"
    " int? weight_dtype=None) -> Tensor",
    _fake,
    contract=_contract,
)
def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """x @ ((weight + antiquant_offset) * antiquant_scale) + bias. The offset is added.

    x float16 or bfloat16 [m, k]; weight int8 [k, n] or int32 [k, n / 8] with eight codes a word;
    scale and offset in x's dtype, [n] or [1, n], or [ceil(k / g), n] for groups of g inputs; bias
    [n], float32 for bfloat16 and float16 for float16. Returns [m, n] in x's dtype: the weight is
    rounded to it (`antiquantize`), sums and bias are float32, and the result is rounded once.
    CANN's kernels for few tokens split activations into int8 instead and round differently.
    """
    codes = unpack_words(weight) if weight.dtype == torch.int32 else weight
    w = antiquantize(codes, antiquant_scale, antiquant_offset, antiquant_group_size, x.dtype)
    if bias is None and x.dtype == torch.bfloat16:
        return x @ w  # PyTorch's bfloat16 matmul sums in float32 and rounds once, and is fast
    result = x.to(torch.float32) @ w.to(torch.float32)
    return (result if bias is None else result.add_(bias)).to(x.dtype)
