"""Gradient steps on the transforms of one piece of a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.ir.run.interpret import Values
from panguq.passes.transforms.blocks import Piece, RoundedLinear, run_piece, token_errors
from panguq.passes.transforms.learned import Learned, stored_weights

CLIP_SPEED = 10.0  # the learning rate of clips over that of all else
WARM_UP_STEPS = 5
MEMORIES = (0.9, 0.95)  # Adam's


@dataclass(frozen=True)
class LearningPlan:
    """How long and how fast to learn."""

    epochs: int
    learning_rate: float
    batch_sequences: int


@dataclass(frozen=True, eq=False)
class Problem:
    """A piece, its stored tensors, what enters it in the quantized graph for each batch, and what
    the float graph makes of it."""

    piece: Piece
    weights: Values
    given: Sequence[Values]
    wanted: Sequence[Mapping[fx.Node, Tensor]]

    def rounded(self, learned: Sequence[Learned]) -> dict[fx.Node, RoundedLinear]:
        """All linears that are learned, as they are now."""
        found: dict[fx.Node, RoundedLinear] = {}
        for one in learned:
            weights = one.quantized_weights(stored_weights(one.site, self.weights))
            how = one.quantized_input
            found |= {linear: RoundedLinear(weight, how) for linear, weight in weights.items()}
        return found

    def errors(self, index: int, rounded: Mapping[fx.Node, RoundedLinear]) -> Tensor:
        """Of one batch: each token's squared error over its square, `[tokens]`."""
        values = {**self.given[index], **self.weights}
        run_piece(self.piece.nodes, values, rounded)
        return token_errors(values, self.wanted[index])

    def all_errors(self, learned: Sequence[Learned]) -> list[Tensor]:
        """`errors` of every batch, without gradients."""
        with torch.no_grad():
            rounded = self.rounded(learned)
            return [self.errors(index, rounded) for index in range(len(self.given))]


def train(
    problem: Problem, learned: Sequence[Learned], plan: LearningPlan, generator: torch.Generator
) -> None:
    """Adam (arXiv 1412.6980) on the mean of `errors`, batches in random order, the rate rising over
    a few steps and then falling with a cosine. What is learned is left as it was at the start if
    that was better, or the steps led to numbers that are not finite."""
    before = mean_error(problem.all_errors(learned))
    start = [{k: v.clone() for k, v in one.parameters().items()} for one in learned]
    named = [item for one in learned for item in one.parameters().items()]
    for _, parameter in named:
        parameter.requires_grad_()
    groups = [
        {"params": [p for name, p in named if name.startswith("clip") == clips], "lr": rate}
        for clips, rate in (
            (False, plan.learning_rate),
            (True, CLIP_SPEED * plan.learning_rate),
        )
    ]
    optimizer = torch.optim.Adam(groups, betas=MEMORIES)
    steps = -(-len(problem.given) // plan.batch_sequences)
    total = steps * plan.epochs

    def rate(done: int) -> float:
        return min(1.0, (done + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * done / total)) / 2

    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(plan.epochs):
        order = torch.randperm(len(problem.given), generator=generator).tolist()
        for step in range(steps):
            some = order[step * plan.batch_sequences :][: plan.batch_sequences]
            optimizer.zero_grad()
            with torch.enable_grad():
                rounded = problem.rounded(learned)
                errors = torch.cat([problem.errors(index, rounded) for index in some])
                errors.mean().backward()
            optimizer.step()
            falling.step()
            for one in learned:
                one.bound()
    for _, parameter in named:
        parameter.requires_grad_(False)
    if not mean_error(problem.all_errors(learned)) < before:
        for one, values in zip(learned, start, strict=True):
            one.load(values)


def mean_error(errors: Sequence[Tensor]) -> float:
    """The mean over all tokens."""
    return float(torch.cat(list(errors)).mean())
