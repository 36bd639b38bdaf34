"""How fast models answer, as ratios against a baseline measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from panguq.ir.kv_cache import CACHE_NAME, cache_of

PREFILL_TOKENS = 512
DECODE_TOKENS = 24
PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one model over repeats, and how many times faster than the baseline it is.

    The ratios compare neighbouring runs, so that a drift of the machine's speed cancels.
    """

    milliseconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median over repeats."""
        return statistics.median(self.milliseconds)

    @property
    def median_ratio(self) -> float:
        """Median of the paired ratios."""
        return statistics.median(self.ratios)

    def render(self) -> str:
        """`12.3 ms (11.9-14.0), 2.10x (1.98-2.21)`."""
        low, high = min(self.milliseconds), max(self.milliseconds)
        slow, fast = min(self.ratios), max(self.ratios)
        return (
            f"{self.median_ms:8.1f} ms ({low:.1f}-{high:.1f})  "
            f"{self.median_ratio:5.2f}x ({slow:.2f}-{fast:.2f})"
        )


def prefill_ms(model: Any, ids: Tensor) -> float:
    """One prompt `[1, seq]` through the model, as `generate` does it: the last token's logits."""
    start = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return (time.perf_counter() - start) * 1e3


def decode_ms(model: Any, ids: Tensor) -> float:
    """Milliseconds a token at batch 1, after a prompt that is not counted."""
    with torch.no_grad():
        output = model(input_ids=ids[:, :PROMPT_TOKENS], use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(DECODE_TOKENS):
            step = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=step, **{CACHE_NAME: cache_of(output)}, use_cache=True)
    return (time.perf_counter() - start) * 1e3 / DECODE_TOKENS


def compare(
    models: Mapping[str, Any],
    baseline: str,
    measure: Callable[[Any, Tensor], float],
    ids: Tensor,
    repeats: int,
) -> dict[str, Timing]:
    """Run all models in turn, `repeats` times after one warm-up."""
    for model in models.values():
        measure(model, ids)
    samples: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            samples[name].append(measure(model, ids))
    base = samples[baseline]
    return {
        name: Timing(tuple(ms), tuple(b / x for b, x in zip(base, ms, strict=True)))
        for name, ms in samples.items()
    }
