"""Codes of less than a byte, packed: the layouts in which panguq stores such weights.

Two 4-bit codes lie in a byte (`pack_int4`), as kernels read them; codes of any other width lie one
after the other in a row's bits (`pack_codes`). Codes of experts may be stacked, `[experts, n, k]`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from panguq.ir.ops.opset import define_op
from panguq.tensors.row_slices import each_matrix, row_slices


def _fake_pack_int4(codes: Tensor) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] // 2), dtype=torch.uint8)


@define_op("pack_int4(Tensor codes) -> Tensor", fake=_fake_pack_int4)
def pack_int4(codes: Tensor) -> Tensor:
    """int8 [n, k] with values in [-8, 7], k even -> uint8 [n, k / 2].

    Nibbles are two's complement; the low one holds the even column.
    """
    packed = codes.new_empty((*codes.shape[:-1], codes.shape[-1] // 2), dtype=torch.uint8)
    if codes.dim() == 3:
        return each_matrix(pack_int4, packed, codes)
    for rows in row_slices(codes):
        nibbles = codes[rows].view(torch.uint8).bitwise_and(0x0F)
        packed[rows] = nibbles[:, 1::2].bitwise_left_shift(4).bitwise_or_(nibbles[:, 0::2])
    return packed


def _fake_unpack_int4(packed: Tensor) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=torch.int8)


@define_op("unpack_int4(Tensor packed) -> Tensor", fake=_fake_unpack_int4)
def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [n, k / 2] -> int8 [n, k] with values in [-8, 7], the inverse of `pack_int4`."""
    # Every byte 0xHL becomes the 16-bit word 0x0H0L: on a little-endian machine its two bytes are
    # the nibbles in order. Many times faster than writing even and odd columns separately.
    packed = packed.contiguous()
    codes = packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=torch.int8)
    if packed.dim() == 3:
        return each_matrix(unpack_int4, codes, packed)
    for rows in row_slices(packed):
        words = packed[rows].bitwise_xor(0x88).to(torch.int16)
        words = words.mul(16).bitwise_or_(words).bitwise_and_(0x0F0F)
        # The xor flipped the sign bits, which turned two's complement into code + 8.
        torch.sub(words.view(torch.int8), 8, out=codes[rows])
    return codes


CODES_PER_PACK = 8  # eight codes of b bits are b bytes
CODES_AT_ONCE = 1 << 21


def packed_columns(k: int, bits: int) -> int:
    """Bytes of a row of k codes: whole packs of eight codes, the last one padded with zeros."""
    return -(-k // CODES_PER_PACK) * bits


def _fake_pack_codes(codes: Tensor, bits: int) -> Tensor:
    shape = (*codes.shape[:-1], packed_columns(codes.shape[-1], bits))
    return codes.new_empty(shape, dtype=torch.uint8)


@define_op("pack_codes(Tensor codes, int bits) -> Tensor", fake=_fake_pack_codes)
def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 [n, k] with values in [-2^(bits-1), 2^(bits-1)) -> uint8 [n, ceil(k / 8) * bits].

    1 <= bits <= 7. Codes are two's complement; column j's lowest bit is bit (j mod 8) * bits of its
    pack of eight columns, and bytes are little-endian.
    """
    packed = _fake_pack_codes(codes, bits)
    if codes.dim() == 3:
        return each_matrix(functools.partial(pack_codes, bits=bits), packed, codes)
    n, k = codes.shape
    shifts = torch.arange(CODES_PER_PACK) * bits
    rows = max(1, CODES_AT_ONCE // max(k, 1))
    for start in range(0, n, rows):
        part = torch.nn.functional.pad(codes[start : start + rows], (0, -k % CODES_PER_PACK))
        fields = part.long().bitwise_and_(2**bits - 1).view(len(part), -1, CODES_PER_PACK)
        words = fields.bitwise_left_shift_(shifts).sum(-1, keepdim=True)
        packed[start : start + rows] = words.view(torch.uint8)[..., :bits].flatten(1)
    return packed


def _fake_unpack_codes(packed: Tensor, k: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], k), dtype=torch.int8)


@define_op("unpack_codes(Tensor packed, int bits, int k) -> Tensor", fake=_fake_unpack_codes)
def unpack_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """uint8 [n, ceil(k / 8) * bits] -> int8 [n, k], the inverse of `pack_codes`."""
    n = packed.shape[0]
    codes = _fake_unpack_codes(packed, k)
    if packed.dim() == 3:
        return each_matrix(functools.partial(unpack_codes, bits=bits, k=k), codes, packed)
    shifts = torch.arange(CODES_PER_PACK) * bits
    sign = 2 ** (bits - 1)
    rows = max(1, CODES_AT_ONCE // max(k, 1))
    for start in range(0, n, rows):
        part = packed[start : start + rows].view(-1, packed.shape[1] // bits, bits)
        padded = torch.nn.functional.pad(part, (0, 8 - bits)).contiguous()
        words = padded.view(torch.int64)
        fields = words.bitwise_right_shift(shifts).bitwise_and_(2**bits - 1)
        signed = fields.bitwise_xor_(sign).sub_(sign)
        codes[start : start + rows] = signed.flatten(1)[:, :k]
    return codes
