"""Codes in 32-bit words: against readers that take bit after bit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from panguq.tensors import word_packing
from panguq.tensors.word_packing import awq_words, packed_words
from tests.formats.checkpoint.read_words import from_awq_words, unpacked_words


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_codes_are_one_stream_of_bits(bits: int, rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, 32 * blocks), generator=generator)
    words = packed_words(values, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, bits * blocks)
    assert torch.equal(unpacked_words(words, bits), values)
    assert torch.equal(word_packing.unpacked_words(words, bits), values.to(torch.uint8))


def test_three_bits_lie_across_words() -> None:
    """The eleventh code: two bits in the first word, one in the second."""
    values = torch.zeros(1, 32, dtype=torch.uint8)
    values[0, 10] = 0b101
    assert packed_words(values, 3).tolist() == [[1 << 30, 1, 0]]


def test_awq_takes_even_columns_before_odd_ones() -> None:
    words = awq_words(torch.arange(16, dtype=torch.uint8).reshape(1, 16))
    assert [f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()] == [
        "75316420",
        "fdb9eca8",
    ]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_awq_words_are_read_back(rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (rows, 8 * blocks), generator=generator)
    assert torch.equal(from_awq_words(awq_words(values)), values)
