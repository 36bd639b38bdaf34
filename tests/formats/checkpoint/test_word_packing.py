"""Codes in 32-bit words: against the bits, one after the other."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from panguq.formats.checkpoint.word_packing import (
    awq_words,
    from_awq_words,
    packed_words,
    unpacked_words,
)


def stream(values: list[int], bits: int) -> list[int]:
    """The words of a row as text: every code's bits, lowest first, 32 a word."""
    text = "".join(f"{value:0{bits}b}"[::-1] for value in values)
    return [int(text[start : start + 32][::-1], 2) for start in range(0, len(text), 32)]


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_codes_are_one_stream_of_bits(bits: int, rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, 32 * blocks), dtype=torch.uint8, generator=generator)
    words = packed_words(values, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, bits * blocks)
    for row, packed in zip(values.tolist(), words.tolist(), strict=True):
        assert [word & 0xFFFFFFFF for word in packed] == stream(row, bits)
    assert torch.equal(unpacked_words(words, bits), values)


def test_awq_takes_even_columns_before_odd_ones() -> None:
    words = awq_words(torch.arange(16, dtype=torch.uint8).reshape(1, 16) % 16)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()] == [
        "75316420",
        "fdb9eca8",
    ]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_awq_words_are_read_back(rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (rows, 8 * blocks), dtype=torch.uint8, generator=generator)
    assert torch.equal(from_awq_words(awq_words(values)), values)
