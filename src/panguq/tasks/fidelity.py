"""How near a model stays to float on a task's own prompts: KL, top-1, and where it breaks.

Accuracy of a small model is at chance, or near it, for the best and the worst method alike. What
the model would say next after each token of the prompts still ranks them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from panguq.evaluation import (
    Divergence,
    TopOne,
    first_broken_node,
    logits_of,
    worst_matmul,
)

TOKENS = 4096
"""Of all prompts together at most; a prompt gives its last 512."""
PROMPT = 512


@dataclass(frozen=True)
class Fidelity:
    """KL(float ‖ model) in nats and the share of equal likeliest tokens, over `tokens`; `broken`
    is the first op that yields NaN or Inf, where there is one."""

    kl: float
    top1: float
    tokens: int
    broken: str | None = None


def fidelity(float_model: Any, model: Any, prompts: Sequence[Tensor]) -> Fidelity:
    """Over token ids `[tokens]` of prompts, up to 4,096 tokens in all.

    model: a compiled one. Prompts of one token say nothing and are left out.
    """
    expected, actual = logits_of(float_model), logits_of(model)
    divergence, top_one, taken = Divergence(), TopOne(), 0
    for ids in prompts:
        if len(ids) < 2 or (taken and taken + len(ids) > TOKENS):
            continue
        taken += len(ids)
        wanted, found = expected(ids[None])[0].float(), actual(ids[None])[0].float()
        if not found.isfinite().all():
            broken = first_broken_node(model, ids[None]) if hasattr(model, "graph") else None
            return Fidelity(math.nan, math.nan, taken, broken or "the logits")
        x, y = wanted.log_softmax(-1), found.log_softmax(-1)
        divergence.add(y, x, ids)
        top_one.add(y, x, ids)
    return Fidelity(divergence.result(), top_one.result(), taken)


def prompt_ids(tokenizer: Any, prompts: Sequence[str], longest: int | None) -> list[Tensor]:
    """The last 512 token ids of each prompt."""
    keep = min(PROMPT, longest or PROMPT)
    return [torch.tensor(tokenizer(prompt)["input_ids"][-keep:]) for prompt in prompts]


def broken_matmul(model: Any) -> str | None:
    """The first matmul below 5 dB of local SQNR, or the worst one."""
    return worst_matmul(model) if getattr(model, "report", None) is not None else None
