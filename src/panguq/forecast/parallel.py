"""A model on several cards: what each of them computes, and what they send each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from panguq.errors import InputError
from panguq.forecast.achieved import Achieved
from panguq.forecast.work import MatmulWork, Work
from panguq.ir.interface import Interface
from panguq.lowering.problem import MatmulProblem


@dataclass(frozen=True)
class Cards:
    """`tensor` cards divide every matmul; with `experts` they divide a mixture's experts instead of
    the matmul of each."""

    tensor: int = 1
    experts: int = 1

    def problem(self, work: MatmulWork) -> MatmulProblem:
        """What one card computes of a matmul."""
        problem = work.problem
        if self.tensor == 1:
            return problem
        if problem.experts and self.experts > 1:
            each = problem.experts // self.experts
            return replace(problem, experts=each, top_k=min(problem.top_k, each))
        if work.side == "rows":
            return replace(problem, k=problem.k // self.tensor)
        return replace(problem, n=-(-problem.n // self.tensor))

    def tokens(self, work: MatmulWork, tokens: int) -> int:
        """Those that one card's part of a matmul sees. Experts on other cards take their share."""
        if not work.problem.experts or self.experts == 1:
            return tokens
        each = work.problem.experts // self.experts
        rows = tokens * work.problem.top_k / self.experts
        return max(1, round(rows / min(work.problem.top_k, each)))

    def collective_us(self, sent_bytes: float, achieved: Achieved) -> float:
        """An all-reduce: every card sends and receives 2 (c - 1) / c of the value."""
        if self.tensor == 1:
            return 0.0
        moved = 2 * (self.tensor - 1) / self.tensor * sent_bytes
        return achieved.collective_us + moved / (achieved.link_gb_per_s * 1000)


ONE_CARD = Cards()


def check_cards(cards: Cards, work: Work, interface: Interface, config: Any = None) -> None:
    """Raises InputError, in a sentence, for a division that is not predicted."""
    experts = {m.problem.experts for m in work.matmuls if m.problem.experts}
    if cards.experts > 1 and not experts:
        raise InputError("--ep: the model has no experts", "give --tp alone")
    if cards.experts > 1 and cards.experts != cards.tensor:
        raise InputError(
            f"--ep {cards.experts}: experts lie on the cards that divide the rest, as in vLLM "
            "without data parallelism",
            f"give --tp {cards.experts}, too",
        )
    if cards.tensor == 1:
        return
    if any(layer.states for layer in interface.cache):
        raise InputError("--tp: how cards divide recurrent states is not predicted", "leave it out")
    if getattr(config, "kv_lora_rank", None) or getattr(config, "q_lora_rank", None):
        raise InputError(
            "--tp: how cards divide a cache of latents is not predicted", "leave it out"
        )
    for layer in interface.cache:
        if layer.heads % cards.tensor:
            raise InputError(
                f"--tp {cards.tensor}: does not divide {layer.heads} heads of keys and values",
                "choose a divisor",
            )
    for matmul in work.matmuls:
        size = matmul.problem.k if matmul.side == "rows" else matmul.problem.n
        if matmul.problem.experts and cards.experts > 1:
            size = matmul.problem.experts
        elif matmul.problem.experts == 0 and matmul.side == "columns" and size < 4096:
            continue  # a router or the like, which every card has
        if size % cards.tensor:
            raise InputError(
                f"--tp {cards.tensor}: does not divide the {size} "
                f"{'inputs' if matmul.side == 'rows' else 'outputs'} of {matmul.name}",
                "choose a divisor",
            )
