"""Codes of 1 to 7 bits: what is packed comes back, and the layout is the documented one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from panguq.ir.ops.packing import pack_codes, packed_columns, unpack_codes


def obvious_row(codes: list[int], bits: int) -> list[int]:
    """A row's bytes by way of one large integer for each eight codes."""
    row: list[int] = []
    for start in range(0, len(codes), 8):
        word = 0
        for place, code in enumerate(codes[start : start + 8]):
            word |= (code & (2**bits - 1)) << (place * bits)
        row += word.to_bytes(bits, "little")
    return row


@st.composite
def matrices(draw):
    bits = draw(st.integers(1, 7))
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    code = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    rows = draw(st.lists(st.lists(code, min_size=k, max_size=k), min_size=n, max_size=n))
    return bits, rows


@given(matrices())
@settings(deadline=None)
def test_every_code_comes_back_from_the_documented_bytes(case):
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [obvious_row(row, bits) for row in rows]
    assert packed.shape[1] == packed_columns(codes.shape[1], bits)
    assert torch.equal(unpack_codes(packed, bits, codes.shape[1]), codes)


def test_the_first_code_has_the_lowest_bits():
    codes = torch.tensor([[1, -1, 0, 0, 0, 0, 0, -4]], dtype=torch.int8)
    assert pack_codes(codes, 3).tolist() == [[0b00111001, 0, 0b10000000]]


def test_rows_and_columns_of_a_larger_weight_can_be_packed():
    codes = torch.randint(-4, 4, (6, 48), dtype=torch.int8)
    part = codes[1:5, 8:24]
    assert torch.equal(pack_codes(part, 3), pack_codes(codes, 3)[1:5, 3:9])
    assert torch.equal(unpack_codes(pack_codes(codes, 3)[1:5, 3:9], 3, 16), part)


@pytest.mark.parametrize("bits", [1, 3, 7])
def test_fakes_agree_with_bodies(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 11), dtype=torch.int8)
    opcheck(pack_codes, (codes, bits))
    opcheck(unpack_codes, (pack_codes(codes, bits), bits, 11))
