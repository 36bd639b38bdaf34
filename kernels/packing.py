"""Two 4-bit codes in a byte: the layout in which panguq stores and exchanges int4 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.ir.opset import define_op


def _fake_pack_int4(codes: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], codes.shape[1] // 2), dtype=torch.uint8)


@define_op("pack_int4(Tensor codes) -> Tensor", fake=_fake_pack_int4)
def pack_int4(codes: Tensor) -> Tensor:
    """int8 [n, k] with values in [-8, 7], k even -> uint8 [n, k / 2].

    Nibbles are two's complement; the low one holds the even column.
    """
    nibbles = codes.view(torch.uint8).bitwise_and(0x0F)
    return nibbles[:, 1::2].bitwise_left_shift(4).bitwise_or_(nibbles[:, 0::2])


def _fake_unpack_int4(packed: Tensor) -> Tensor:
    return packed.new_empty((packed.shape[0], packed.shape[1] * 2), dtype=torch.int8)


@define_op("unpack_int4(Tensor packed) -> Tensor", fake=_fake_unpack_int4)
def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [n, k / 2] -> int8 [n, k] with values in [-8, 7], the inverse of `pack_int4`."""
    # Every byte 0xHL becomes the 16-bit word 0x0H0L: on a little-endian machine its two bytes are
    # the nibbles in order. Many times faster than writing even and odd columns separately.
    words = packed.bitwise_xor(0x88).to(torch.int16)
    words = words.mul(16).bitwise_or_(words).bitwise_and_(0x0F0F)
    # The xor flipped the sign bits, which turned two's complement into code + 8.
    return words.view(torch.int8).sub_(8)
