"""Codes whose width varies by group of columns, packed group behind group.

A group of 1-bit codes has the codes -1 and 1, so that `(code - zero_point) * scale` can express two
values of equal size; b > 1 bits have the codes from -2^(b-1) to 2^(b-1) - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.ir.ops.opset import define_op
from panguq.ir.ops.packing import pack_codes, packed_columns, unpack_codes


def pack_mixed_codes(codes: Tensor, bits: Tensor, group_size: int) -> Tensor:
    """int8 [n, groups * group_size] -> uint8 [n, bytes], group g as `pack_codes` packs bits[g].

    bits uint8 [groups], from 1 to 8; 8-bit codes are bytes as they are.
    """
    parts = []
    for group, width in zip(codes.split(group_size, 1), bits.tolist(), strict=True):
        if width == 8:
            parts.append(group.contiguous().view(torch.uint8))
        else:
            fields = (group - 1) >> 1 if width == 1 else group
            parts.append(pack_codes(fields, width))
    return torch.cat(parts, 1)


def _fake_unpack_mixed_codes(packed: Tensor, bits: Tensor, group_size: int) -> Tensor:
    return packed.new_empty((packed.shape[0], bits.shape[0] * group_size), dtype=torch.int8)


@define_op(
    "unpack_mixed_codes(Tensor packed, Tensor bits, int group_size) -> Tensor",
    fake=_fake_unpack_mixed_codes,
)
def unpack_mixed_codes(packed: Tensor, bits: Tensor, group_size: int) -> Tensor:
    """uint8 [n, bytes], uint8 [groups] -> int8 [n, groups * group_size]: `pack_mixed_codes` undone.

    All rows have the widths `bits`, from 1 to 8.
    """
    groups, start = [], 0
    for width in bits.tolist():
        stop = start + (group_size if width == 8 else packed_columns(group_size, width))
        part = packed[:, start:stop]
        if width == 8:
            groups.append(part.view(torch.int8))
        else:
            fields = unpack_codes(part, width, group_size)
            groups.append(fields * 2 + 1 if width == 1 else fields)
        start = stop
    return torch.cat(groups, 1)
