"""Nibbles: what is packed comes back, and the layout is the documented one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from panguq.ir.ops.packing import pack_int4, unpack_int4


def test_the_low_nibble_holds_the_even_column():
    codes = torch.tensor([[1, 2, -1, -8]], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [[0x21, 0x8F]]


def test_every_byte_survives_the_round_trip():
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes = unpack_int4(packed)
    assert codes.min() == -8 and codes.max() == 7
    assert torch.equal(pack_int4(codes), packed)


@given(n=st.integers(1, 5), half_k=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None)
def test_every_code_survives_the_round_trip(n, half_k, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (n, 2 * half_k), dtype=torch.int8, generator=generator)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


def test_columns_of_a_larger_weight_can_be_packed():
    codes = torch.randint(-8, 8, (4, 12), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes)[:, 2:4]), codes[:, 4:8])
    assert torch.equal(pack_int4(codes[:, 4:8]), pack_int4(codes)[:, 2:4])


def test_fakes_agree_with_bodies():
    codes = torch.randint(-8, 8, (4, 6), dtype=torch.int8)
    opcheck(pack_int4, (codes,))
    opcheck(unpack_int4, (pack_int4(codes),))
