"""Codes read back out of 32-bit words, bit by bit: how GPTQ's and AWQ's readers take them."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def bits_of_words(words: Tensor) -> Tensor:
    """Every row's bits in order, the lowest of a word first: `[r, c * 32]` out of `[r, c]`."""
    return ((words.unsqueeze(-1) >> torch.arange(WORD)) & 1).flatten(1)


def unpacked_words(words: Tensor, bits: int) -> Tensor:
    """The integers of `bits` bits that lie one after the other in a row's words."""
    places = 2 ** torch.arange(bits)
    return (bits_of_words(words).unflatten(1, (-1, bits)) * places).sum(-1)


def from_awq_words(words: Tensor) -> Tensor:
    """The integers of 4 bits of AWQ's words, eight columns in each, in the columns' order."""
    found = torch.empty(words.shape[0], words.shape[1], 8, dtype=torch.int64)
    found[..., list(AWQ_ORDER)] = unpacked_words(words, 4).unflatten(1, (-1, 8))
    return found.flatten(1)
