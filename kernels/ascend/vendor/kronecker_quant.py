"""npu_kronecker_quant: a Kronecker product and 4-bit codes with one scale per token, in one op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.ir.ops.quantize import SMALLEST_AMAX
from panguq.kernels.ascend.limits import CODES_PER_WORD, KRONECKER_LARGEST
from panguq.kernels.ascend.vendor.contracts import (
    PANGUQ,
    Broken,
    not_given,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.dtypes import dtype_of
from panguq.kernels.ascend.vendor.int4pack import pack_words
from panguq.kernels.ascend.vendor.library import define_npu_op

_ACLNN = "aclnnFlatQuant"
_HOST = "op-plugin's host code for npu_kronecker_quant"
LARGEST_M = 262144
LARGEST_CODE = 7


def _contract(
    x: Tensor,
    kronecker_p1: Tensor,
    kronecker_p2: Tensor,
    clip_ratio: float | None,
    dst_dtype: int | None,
    dst_type_max: float | None,
) -> Iterator[Broken]:
    yield from wrong_dtype("x", x, (torch.float16, torch.bfloat16), _ACLNN)
    if x.dim() != 3:
        yield Broken(f"x must have 3 dimensions, not {x.dim()}", _ACLNN)
        return
    rows, left, right = x.shape
    for name, factor, size in (("kronecker_p1", kronecker_p1, left),
                               ("kronecker_p2", kronecker_p2, right)):  # fmt: skip
        yield from wrong_dtype(name, factor, (x.dtype,), _ACLNN)
        yield from wrong_shape(name, factor, [(size, size)], _ACLNN)
        if surely(size > KRONECKER_LARGEST):
            yield Broken(f"{name} may have {KRONECKER_LARGEST} rows, not {size}", _ACLNN)
    if surely(rows > LARGEST_M):
        yield Broken(f"x's first size may be {LARGEST_M}, not {rows}", _ACLNN)
    if surely(right % CODES_PER_WORD != 0):
        yield Broken(f"x's last size {right} must be a multiple of {CODES_PER_WORD}", _ACLNN)
    if clip_ratio is not None and not 0.0 < clip_ratio <= 1.0:
        yield Broken(f"clip_ratio must lie in (0, 1], not {clip_ratio}", _ACLNN)
    if dtype_of(dst_dtype, torch.int32) != torch.int32:
        yield Broken(f"dst_dtype must be int32, not {dst_dtype}", _HOST)
    yield from not_given({"dst_type_max": dst_type_max}, PANGUQ)


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    words = (*x.shape[:-1], x.shape[-1] // CODES_PER_WORD)
    scale = x.new_empty(x.shape[:1], dtype=torch.float32)
    return x.new_empty(words, dtype=torch.int32), scale


@define_npu_op(
    "npu_kronecker_quant(Tensor x, Tensor kronecker_p1, Tensor kronecker_p2,"
    " float? clip_ratio=None, int? dst_dtype=None, float? dst_type_max=None)"
    " -> (Tensor out, Tensor quant_scale)",
    _fake,
    contract=_contract,
)
def npu_kronecker_quant(
    x: Tensor,
    kronecker_p1: Tensor,
    kronecker_p2: Tensor,
    clip_ratio: float | None = None,
    dst_dtype: int | None = None,
    dst_type_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    """z = p1 @ (x @ p2), scale = clip_ratio * max|z| / 7 over each x[m], codes = round(z / scale).

    x float16 or bfloat16 [m, a, b], p1 [a, a] and p2 [b, b] of its dtype, 0 < clip_ratio <= 1, 1 if
    it is not given. Returns int32 [m, a, b / 8], eight codes a word along b, and float32 [m].
    As the kernel of ops-nn (quant/flat_quant) has it: the first product is rounded to x's dtype,
    z to float16, also beside bfloat16, and codes are made of z times (7 / clip) / max in float32,
    rounded to float16 and then half to even. Codes beyond 4 bits become -8 or 7. A token of zeros,
    of which nothing is written, gets codes 0 and the scale of `quantize_per_token`.
    """
    clip = 1.0 if clip_ratio is None else clip_ratio
    z = (kronecker_p1.float() @ (x @ kronecker_p2).float()).to(torch.float16).float()
    largest = z.abs().amax((1, 2)).clamp_min_(SMALLEST_AMAX)
    steps = (z * ((LARGEST_CODE / clip) / largest)[:, None, None]).to(torch.float16)
    codes = steps.float().round_().clamp_(-LARGEST_CODE - 1, LARGEST_CODE).to(torch.int8)
    return pack_words(codes), largest * (clip / LARGEST_CODE)
