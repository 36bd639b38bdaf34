"""What is chosen for a matmul, and the numbers of tokens that a choice is made for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from panguq.errors import LoweringError
from panguq.lowering.problem import Candidate, Precision, Storage, WeightFormat

DECODE_M, PREFILL_M = 1, 512
# What a served request is made of: one prompt, then this many tokens one by one.
DECODE_STEPS = 256
LARGEST_M = 8192
HYSTERESIS = 0.05
NOTED_TOKENS = (1, 16, 512)
"""What `Target.notes` predicts for: decoding one and several sequences, and a prompt."""


@dataclass(frozen=True)
class TokenMix:
    """How often a matmul sees how many tokens: decoding steps with 1 … 64 sequences, and prompts.

    The cost of a mix is `decode_weight · mean cost over decode + prefill_weight · mean cost over
    prefill`. Raises LoweringError for numbers of tokens below 1 and weights below 0.
    """

    decode: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    prefill: tuple[int, ...] = (512, 1024, 2048, 4096)
    decode_weight: float = float(DECODE_STEPS)
    prefill_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, tokens in (("decode", self.decode), ("prefill", self.prefill)):
            if any(not isinstance(m, int) or m < 1 for m in tokens):
                raise LoweringError(f"token mix: {name}: {tokens}: tokens are whole, from 1 up")
        for name, weight, tokens in (
            ("decode_weight", self.decode_weight, self.decode),
            ("prefill_weight", self.prefill_weight, self.prefill),
        ):
            if not math.isfinite(weight) or weight < 0:
                raise LoweringError(f"token mix: {name}: {weight} is not zero or more")
            if weight > 0 and not tokens:
                raise LoweringError(f"token mix: {name} is {weight}, but there are no tokens")
        if self.decode_weight + self.prefill_weight == 0:
            raise LoweringError("token mix: both weights are zero")

    def weights(self) -> dict[int, float]:
        """The weight of each number of tokens."""
        result: dict[int, float] = {}
        for tokens, weight in (
            (self.decode, self.decode_weight),
            (self.prefill, self.prefill_weight),
        ):
            for m in tokens:
                result[m] = result.get(m, 0.0) + weight / len(tokens)
        return {m: weight for m, weight in result.items() if weight > 0}


DEFAULT_MIX = TokenMix()


@dataclass(frozen=True)
class TableEntry:
    """For first_m <= m <= last_m (None: and beyond) this kernel runs."""

    first_m: int
    last_m: int | None
    candidate: Candidate


@dataclass(frozen=True)
class Choice:
    """The winner, every other kernel with its cost at decode and prefill, and the crossovers.

    On a CPU, `few_tokens`: up to this m the winner reads its weight as it is (int8 bytes, or 4-bit
    codes in the kernel's layout), beyond it brings the stored weight to bfloat16 first; 0 if the
    winner does the same at every m. On an Ascend target,
    `storage` is the stored weight, decided once; `table` says which kernel runs for which m, all
    of that storage; no entry is dearer than `1 + hysteresis` times the cheapest legal kernel for
    any m up to LARGEST_M; `weight_format` is the problem's; `storage_us` is the cost of the token
    mix for each storage allowed.
    """

    kernel: str
    precision: Precision
    few_tokens: int
    losers: tuple[tuple[str, str], ...]
    decode_us: float
    prefill_us: float
    storage: Storage = "float"
    table: tuple[TableEntry, ...] = ()
    hysteresis: float = 0.0
    storage_us: tuple[tuple[Storage, float], ...] = ()
    weight_format: WeightFormat = "ND"

    @property
    def mix_us(self) -> float:
        """The cost of the token mix with the chosen storage; where the target did not weigh
        storages, of 256 decoding steps and one prompt of 512 tokens."""
        requests_us = DECODE_STEPS * self.decode_us + self.prefill_us
        return dict(self.storage_us).get(self.storage, requests_us)
