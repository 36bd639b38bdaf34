"""npu_convert_weight_to_int4pack: eight 4-bit codes in an int32, the lowest nibble first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.ir.ops.packing import pack_int4, unpack_int4
from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    Broken,
    not_contiguous,
    surely,
    wrong_dtype,
)
from panguq.kernels.ascend.vendor.library import define_npu_op

_DOCS = OP_PLUGIN.format("npu_convert_weight_to_int4pack")
_HOST = "torch_npu's host code for npu_convert_weight_to_int4pack"


def pack_words(codes: Tensor) -> Tensor:
    """int8 [..., n], n % 8 == 0 -> int32 [..., n / 8]; of each code the low four bits are kept.

    Nibble i of a word (bits 4i to 4i + 3) is column 8 * word + i, in two's complement.
    """
    packed = pack_int4(codes.reshape(-1, codes.shape[-1]))
    return packed.view(torch.int32).view(*codes.shape[:-1], codes.shape[-1] // CODES_PER_WORD)


def unpack_words(packed: Tensor) -> Tensor:
    """int32 [..., n / 8] -> int8 [..., n] with values in [-8, 7], the inverse of `pack_words`."""
    rows = packed.reshape(-1, packed.shape[-1]).contiguous().view(torch.uint8)
    return unpack_int4(rows).view(*packed.shape[:-1], packed.shape[-1] * CODES_PER_WORD)


def _contract(weight: Tensor) -> Iterator[Broken]:
    yield from wrong_dtype("weight", weight, (torch.int32,), _HOST)
    if weight.dim() != 2:
        yield Broken(f"weight must have 2 dimensions, not {weight.dim()}", _DOCS)
    elif surely(weight.shape[1] % CODES_PER_WORD != 0):
        yield Broken(
            f"weight's last size {weight.shape[1]} must be a multiple of {CODES_PER_WORD}", _HOST
        )
    yield from not_contiguous("weight", weight, _HOST)


def _fake(weight: Tensor) -> Tensor:
    shape = (weight.shape[0], weight.shape[1] // CODES_PER_WORD)
    return weight.new_empty(shape, dtype=torch.int32)


@define_npu_op(
    "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
    _fake,
    contract=_contract,
)
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """int32 [k, n] with whole values in [-8, 7] -> int32 [k, n / 8].

    See `pack_words` for the layout. Of values outside [-8, 7] the low four bits are kept, as
    torch_npu's host code does; `inner_k_tiles` is reserved there and unused.
    """
    return pack_words(weight.to(torch.int8))
