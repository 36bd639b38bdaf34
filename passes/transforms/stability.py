"""Whether a quantized piece's error grows along a text, as it does where long reasoning fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from panguq.decibels import decibels

FIRST = 4  # tokens, which are often massive and unlike all later ones
GROWS_DB = 2.0


class Stability(NamedTuple):
    """The relative error in dB of the first and of the last quarter of all texts of one kind; empty
    strings where there are none of 16 tokens."""

    early: float | str
    late: float | str

    @property
    def grows(self) -> bool:
        """Whether it is larger by `GROWS_DB` in the end."""
        return not isinstance(self.early, str) and float(self.late) - self.early > GROWS_DB


def stability(errors: Sequence[Tensor], lengths: Sequence[int]) -> Stability:
    """Of relative squared errors, `[sequences * length]` for each batch."""
    early, late = [], []
    for error, length in zip(errors, lengths, strict=True):
        if length < 16 or error.numel() % length:
            continue
        rows = error.view(-1, length)
        quarter = length // 4
        early.append(rows[:, min(FIRST, quarter - 1) : quarter].flatten())
        late.append(rows[:, -quarter:].flatten())
    if not early:
        return Stability("", "")
    return Stability(*(decibels(max(float(torch.cat(x).mean()), 1e-30)) for x in (early, late)))
