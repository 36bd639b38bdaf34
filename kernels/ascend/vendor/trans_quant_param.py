"""npu_trans_quant_param: the scales that the cube core's output stage reads, 19 bits of a float32.

Sign, 8 bits of exponent and 10 of mantissa ("fp19"), in the low half of an int64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    Broken,
    Size,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.library import define_npu_op

_DOCS = OP_PLUGIN.format("npu_trans_quant_param")
_META = "torch_npu's Meta kernel for npu_trans_quant_param"
FP19_MASK = 0xFFFFE000 - 2**32  # as a signed 32-bit number
SCALE_FLAG = 1 << 46
OFFSET_SHIFT = 37
OFFSET_MASK = 0x1FF
OFFSET_RANGE = (-256, 255)
BITS_BESIDE_OFFSET = 0x4000FFFFFFFF


def scale_bits(scale: Tensor, nearest: bool = False) -> Tensor:
    """float32 [...] -> int32 [...]: the bits of the scale without the low 13.

    They are cut off, or, if `nearest`, rounded half to even.
    """
    bits = scale.contiguous().view(torch.int32)
    if nearest:
        # One less than half of what is dropped, and one more if the last bit kept is odd.
        bits = bits + 0xFFF + (bits.bitwise_right_shift(13) & 1)
    return bits & FP19_MASK


def scale_of(parameter: Tensor) -> Tensor:
    """int64 [...] -> float32 [...]: the scale that the hardware reads out of a parameter.

    It ignores the low 13 bits of any parameter.
    """
    low_halves = parameter.contiguous().view(torch.int32).unflatten(-1, (-1, 2))[..., 0]
    return (low_halves & FP19_MASK).view(torch.float32)


def offset_of(parameter: Tensor) -> Tensor:
    """int64 [...] -> int32 [...]: the 9-bit offset in a parameter, 0 where there is none."""
    bits = parameter.bitwise_right_shift(OFFSET_SHIFT) & OFFSET_MASK
    return ((bits ^ 0x100) - 0x100).to(torch.int32)


def round_offset(offset: Tensor) -> Tensor:
    """float32 [...] -> int32 [...] in [-256, 255]; a half is rounded away from zero, as C does."""
    rounded = offset.abs().add(0.5).floor_().copysign(offset)
    return rounded.clamp_(*OFFSET_RANGE).to(torch.int32)


def _contract(scale: Tensor, offset: Tensor | None, round_mode: int | None) -> Iterator[Broken]:
    yield from wrong_dtype("scale", scale, (torch.float32,), _DOCS)
    yield from wrong_dtype("offset", offset, (torch.float32,), _DOCS)
    is_row = scale.dim() == 2 and not surely(scale.shape[0] != 1)
    if scale.dim() != 1 and not is_row:
        yield Broken(f"scale must have shape [n] or [1, n], not {list(scale.shape)}", _META)
    if round_mode not in (0, 1):
        yield Broken(f"round_mode must be 0 or 1, not {round_mode}", _META)
    if offset is None:
        return
    legal: list[Sequence[Size]] = [scale.shape]
    if scale.dim() == 1:
        # One of the two may hold a single value for all.
        legal = [scale.shape, (1,)] if surely(scale.shape[0] != 1) else [offset.shape]
    yield from wrong_shape("offset", offset, legal, _META)


def _fake(scale: Tensor, offset: Tensor | None) -> Tensor:
    shape = scale.shape if offset is None else torch.broadcast_shapes(scale.shape, offset.shape)
    return scale.new_empty(shape, dtype=torch.int64)


@define_npu_op(
    "npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor",
    _fake,
    contract=_contract,
)
def npu_trans_quant_param(
    scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0
) -> Tensor:
    """float32 [n] or [1, n], offset of the same shape or [1] -> int64 of that shape.

    Bits 0..31 hold the scale's bits & 0xFFFFE000, bit 46 is set, bits 37..45 hold the offset,
    rounded and clamped to [-256, 255]. `round_mode` 1 rounds the scale to the nearest such number
    first, where 0 truncates (op-plugin's page; that a tie goes to the even one is read from the
    mode's name there, R_INT).
    """
    bits = scale_bits(scale, nearest=round_mode == 1).to(torch.int64) & 0xFFFFFFFF
    parameter = bits | SCALE_FLAG
    if offset is None:
        return parameter
    offset_bits = (round_offset(offset).to(torch.int64) & OFFSET_MASK) << OFFSET_SHIFT
    return (parameter & BITS_BESIDE_OFFSET) | offset_bits
