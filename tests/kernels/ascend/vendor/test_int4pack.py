"""Eight 4-bit codes in an int32: the bytes that npu_convert_weight_to_int4pack makes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from panguq.ir.ops.packing import pack_int4
from panguq.kernels.ascend.vendor.int4pack import (
    npu_convert_weight_to_int4pack,
    pack_words,
    unpack_words,
)


def test_the_lowest_nibble_holds_the_first_column() -> None:
    weight = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8], [-1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    packed = npu_convert_weight_to_int4pack(weight)
    assert packed.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in packed.flatten().tolist()] == [0x87654321, 0x0000000F]
    assert packed.view(torch.uint8).tolist() == [[0x21, 0x43, 0x65, 0x87], [0x0F, 0, 0, 0]]


def test_viewed_as_bytes_it_is_panguqs_packing_along_n() -> None:
    weight = torch.randint(-8, 8, (6, 24), dtype=torch.int32)
    packed = npu_convert_weight_to_int4pack(weight)
    assert torch.equal(packed.view(torch.uint8), pack_int4(weight.to(torch.int8)))


def test_of_a_value_outside_the_range_the_low_bits_are_kept() -> None:
    weight = torch.tensor([[8, 15, -9, 16, 0, 0, 0, 0]], dtype=torch.int32)
    packed = npu_convert_weight_to_int4pack(weight)
    assert unpack_words(packed).tolist() == [[-8, -1, 7, 0, 0, 0, 0, 0]]


@given(rows=st.integers(1, 9), words=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_unpacking_gives_back_what_was_packed(rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (2, rows, 8 * words), dtype=torch.int8, generator=generator)
    packed = pack_words(codes)
    assert packed.shape == (2, rows, words)
    assert torch.equal(unpack_words(packed), codes)
    assert torch.equal(unpack_words(packed[:, ::2]), codes[:, ::2])
