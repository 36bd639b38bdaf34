"""Codes of few bits as int32 words, the way GPTQ's and AWQ's checkpoints hold them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of eight that lies in nibble 0, 1, … of a word (AutoAWQ's GEMM layout)."""


def packed_words(values: Tensor, bits: int) -> Tensor:
    """Integers from 0 to 2^bits - 1, `[r, c]`, as one stream of bits a row, lowest first: int32
    `[r, c * bits / 32]`. Three bits lie across words where they must, as in GPTQ's files.

    c * bits must be a multiple of 32.
    """
    count, width = _period(bits)
    rows, columns = values.shape
    blocks = values.reshape(rows, columns // count, count)
    words = torch.zeros(rows, columns // count, width, dtype=torch.int64)
    for index in range(count):
        word, shift = divmod(index * bits, WORD)
        value = blocks[..., index].to(torch.int64)
        words[..., word] |= (value << shift) & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= value >> (WORD - shift)
    return _as_int32(words).reshape(rows, -1)


def awq_words(values: Tensor) -> Tensor:
    """Integers from 0 to 15, `[r, c]`, eight columns a word in AWQ's order: int32 `[r, c / 8]`."""
    rows, columns = values.shape
    ordered = values.reshape(rows, columns // 8, 8)[..., list(AWQ_ORDER)]
    return packed_words(ordered.reshape(rows, columns), 4)


def _period(bits: int) -> tuple[int, int]:
    """After how many values, and words, codes begin at a word again."""
    whole = math.lcm(bits, WORD)
    return whole // bits, whole // WORD


def _as_int32(words: Tensor) -> Tensor:
    """Words from 0 to 2^32 - 1 as the int32 of the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpacked_words(words: Tensor, bits: int) -> Tensor:
    """What `packed_words` was given: int32 words `[r, w]` to uint8 `[r, w * 32 / bits]`.

    w * 32 must be a multiple of bits.
    """
    count, width = _period(bits)
    rows, columns = words.shape
    streams = words.to(torch.int64).bitwise_and(0xFFFFFFFF).reshape(rows, columns // width, width)
    values = torch.empty(rows, columns // width, count, dtype=torch.uint8)
    for index in range(count):
        word, shift = divmod(index * bits, WORD)
        value = streams[..., word] >> shift
        if shift + bits > WORD:
            value = value | streams[..., word + 1] << (WORD - shift)
        values[..., index] = value & (2**bits - 1)
    return values.reshape(rows, -1)


def from_awq_words(words: Tensor) -> Tensor:
    """What `awq_words` was given: int32 words `[r, w]` to uint8 `[r, w * 8]`."""
    rows = words.shape[0]
    ordered = unpacked_words(words, 4).reshape(rows, -1, 8)
    values = torch.empty_like(ordered)
    values[..., list(AWQ_ORDER)] = ordered
    return values.reshape(rows, -1)
