"""npu_dynamic_quant: codes with one scale per token, taken from the token itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.ir.ops.quantize import quantize_per_token
from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
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

_DOCS = OP_PLUGIN.format("npu_dynamic_quant")
_ACLNN = "aclnnDynamicQuant"
_LARGEST_CODE: dict[torch.dtype | None, int] = {torch.int8: 127, torch.quint4x2: 7}


def _contract(
    input: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: int | None,
    quant_mode: str,
    dst_type_max: float,
) -> Iterator[Broken]:
    yield from wrong_dtype("input", input, (torch.float16, torch.bfloat16), _ACLNN)
    if not 2 <= input.dim() <= 8:
        yield Broken(f"input must have 2 to 8 dimensions, not {input.dim()}", _ACLNN)
    output = dtype_of(dst_type, torch.int8)
    if output not in _LARGEST_CODE:
        yield Broken(f"dst_type must be int8 or quint4x2, not {output or dst_type}", _DOCS)
    if input.dim() and output == torch.quint4x2 and surely(input.shape[-1] % CODES_PER_WORD != 0):
        yield Broken(
            f"input's last size {input.shape[-1]} must be a multiple of {CODES_PER_WORD} for"
            " quint4x2",
            _ACLNN,
        )
    if smooth_scales is not None:
        yield from wrong_dtype("smooth_scales", smooth_scales, (input.dtype,), _ACLNN)
        yield from wrong_shape("smooth_scales", smooth_scales, [input.shape[-1:]], _ACLNN)
    yield from not_given({"group_index": group_index}, PANGUQ)
    if quant_mode != "pertoken":
        yield Broken(f"quant_mode must be 'pertoken', not {quant_mode!r}", _DOCS)
    if dst_type_max != 0:
        yield Broken(f"dst_type_max must be 0, not {dst_type_max}", _DOCS)


def _fake(input: Tensor, dst_type: int | None) -> tuple[Tensor, Tensor]:
    scale = input.new_empty(input.shape[:-1], dtype=torch.float32)
    if dtype_of(dst_type, torch.int8) == torch.quint4x2:
        shape = (*input.shape[:-1], input.shape[-1] // CODES_PER_WORD)
        return input.new_empty(shape, dtype=torch.int32), scale
    return input.new_empty(input.shape, dtype=torch.int8), scale


@define_npu_op(
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None,"
    ' int? dst_type=None, str quant_mode="pertoken", float dst_type_max=0.) -> (Tensor, Tensor)',
    _fake,
    contract=_contract,
)
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """scale = max|x| / 127 and codes = round(x / scale) over the last dim; 7 for quint4x2 (16).

    input float16 or bfloat16 [..., k], times smooth_scales [k] if given. Returns int8 [..., k], or
    int32 [..., k / 8] with eight codes a word, and float32 [...]. The arithmetic is that of
    `panguq::quantize_per_token`, bit for bit: float32, times the scale's reciprocal, half to even.
    The documented formula leaves open whether x is divided or multiplied, so that a code next to a
    half may differ by one, and says nothing of a token of zeros: here it gets codes 0 and the
    scale of `quantize_per_token`, where CANN's own comparison function in ops-nn takes 1.
    """
    if smooth_scales is not None:
        input = input.to(torch.float32) * smooth_scales.to(torch.float32)
    output = dtype_of(dst_type, torch.int8)
    codes, scale = quantize_per_token(input, _LARGEST_CODE[output])
    scale = scale.squeeze(-1)
    return (pack_words(codes) if output == torch.quint4x2 else codes), scale
