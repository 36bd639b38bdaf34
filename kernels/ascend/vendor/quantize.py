"""npu_quantize: codes with a scale and a zero point that are known before the model runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    Broken,
    names,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.dtypes import dtype_of
from panguq.kernels.ascend.vendor.int4pack import pack_words
from panguq.kernels.ascend.vendor.library import define_npu_op

_DOCS = OP_PLUGIN.format("npu_quantize")
_META = "torch_npu's Meta kernel for npu_quantize"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# What a dtype argument gives: the dtype of the codes and their range.
_Outputs = dict[torch.dtype | None, tuple[torch.dtype, int, int]]
_MULTIPLYING: _Outputs = {
    torch.qint8: (torch.int8, -128, 127),
    torch.int8: (torch.int8, -128, 127),
    torch.quint4x2: (torch.int8, -8, 7),
}
_DIVIDING: _Outputs = {
    torch.qint8: (torch.int8, -128, 127),
    torch.quint8: (torch.uint8, 0, 255),
    torch.int32: (torch.int32, -(2**31), 2**31 - 1),
}


def _quantized_axis(input: Tensor, axis: int, div_mode: bool) -> int:
    """The axis of scales, as a non-negative number. Multiplying, all but -2 means the last one."""
    if not div_mode:
        axis = -2 if axis == -2 else -1
    return axis % input.dim()


def _contract(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int, div_mode: bool
) -> Iterator[Broken]:
    outputs = _DIVIDING if div_mode else _MULTIPLYING
    output = dtype_of(dtype, torch.qint8)
    if output not in outputs:
        yield Broken(
            f"dtype must be {names([known for known in outputs if known])}, not {output or dtype}",
            _DOCS,
        )
    yield from wrong_dtype("input", input, _FLOATS, _DOCS)
    lowest = -input.dim() if div_mode else max(-2, -input.dim())
    if not lowest <= axis < input.dim():
        yield Broken(f"axis must be from {lowest} to {input.dim() - 1}, not {axis}", _DOCS)
        return
    if div_mode:
        yield from wrong_dtype("scales", scales, (torch.float32, torch.bfloat16), _DOCS)
        integers = (torch.int8, torch.uint8, torch.int32, torch.bfloat16)
        yield from wrong_dtype("zero_points", zero_points, integers, _DOCS)
    else:
        if scales.dtype != input.dtype:
            yield Broken(f"scales must have input's dtype {names([input.dtype])}", _DOCS)
        yield from wrong_dtype("zero_points", zero_points, (scales.dtype,), _DOCS)
    quantized = _quantized_axis(input, axis, div_mode)
    size = input.shape[quantized]
    along_axis = [1] * input.dim()
    along_axis[quantized] = size
    shapes = [[size], [1], along_axis, [1] * input.dim()]
    yield from wrong_shape("scales", scales, shapes, _DOCS)
    yield from wrong_shape("zero_points", zero_points, [scales.shape], _DOCS)
    if output == torch.quint4x2 and surely(input.shape[-1] % CODES_PER_WORD != 0):
        yield Broken(
            f"input's last size {input.shape[-1]} must be a multiple of {CODES_PER_WORD} for"
            " quint4x2",
            _META,
        )


def _fake(input: Tensor, dtype: int, div_mode: bool) -> Tensor:
    output = dtype_of(dtype, torch.qint8)
    if output == torch.quint4x2:
        shape = (*input.shape[:-1], input.shape[-1] // CODES_PER_WORD)
        return input.new_empty(shape, dtype=torch.int32)
    codes, _, _ = (_DIVIDING if div_mode else _MULTIPLYING)[output]
    return input.new_empty(input.shape, dtype=codes)


@define_npu_op(
    "npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1,"
    " bool div_mode=True) -> Tensor",
    _fake,
    contract=_contract,
)
def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """clamp(round(input * scales + zero_points)); with `div_mode`, input / scales + zero_points.

    input float [..., k]; scales and zero_points [1], [k] or of input's rank; dtype qint8 (12): int8
    [..., k], or quint4x2 (16): int32 [..., k / 8], eight codes a word. float32 arithmetic, each
    step rounded, and half to even at the end (op-plugin's page gives the formula, ops-nn's
    AscendQuantV2 kernel the float32). The zero point is added before rounding, so that one that is
    not whole shifts codes. A NaN gives an unspecified code.
    """
    quantized = _quantized_axis(input, axis, div_mode)
    output = dtype_of(dtype, torch.qint8)
    codes_dtype, smallest, largest = (_DIVIDING if div_mode else _MULTIPLYING)[output]

    def spread(values: Tensor) -> Tensor:
        shape = [1] * input.dim()
        shape[quantized] = values.numel()
        return values.to(torch.float32).view(shape)

    values = input.to(torch.float32, memory_format=torch.contiguous_format)
    values = values / spread(scales) if div_mode else values * spread(scales)
    if zero_points is not None:
        values.add_(spread(zero_points))
    codes = values.round_().clamp_(smallest, largest).to(codes_dtype)
    return pack_words(codes) if output == torch.quint4x2 else codes
