"""The rows of weights for which tokens count alike, and the solutions of several as one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.ir.edit import label
from panguq.ir.node_meta import meta_of
from panguq.ir.views import Linear
from panguq.passes.codes.weight_problem import Solution
from panguq.ranks import ranks


def row_groups(n: int, groups: int) -> list[slice]:
    """`n` outputs in `groups` runs of nearly the same length; in n runs where there are fewer."""
    count = min(n, groups)
    ends = [n * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


@dataclass(frozen=True)
class WeighedRows:
    """Some rows of weights under each other, and the weights `[tokens]` of each batch for them."""

    name: str
    rows: slice
    tokens: Sequence[Tensor] | None

    def weighted(self, values: Sequence[Tensor], divided: bool) -> Sequence[Tensor]:
        """The batches `[..., k]`, each token times the root of its weight where there are some.

        `divided`: they are this rank's share.
        """
        if self.tokens is None or not values:
            return values
        own = ranks().share(self.tokens) if divided else self.tokens
        return [
            value.reshape(-1, value.shape[-1]) * weight.sqrt().to(value.dtype)[:, None]
            for value, weight in zip(values, own, strict=True)
        ]


def weighed_rows(matmuls: Sequence[fx.Node]) -> list[WeighedRows]:
    """The parts of these matmuls' weights, row by row under each other: one, unless weigh-tokens
    told groups of outputs apart."""
    tokens = meta_of(matmuls[0]).token_weights
    if tokens is None or tokens[0].dim() == 1:
        return [WeighedRows(label(matmuls[0]), slice(None), tokens)]
    parts, start = [], 0
    for matmul in matmuls:
        n, _ = Linear.of(matmul).shape
        batches = meta_of(matmul).token_weights or ()
        for number, rows in enumerate(row_groups(n, len(batches[0]))):
            own = slice(start + rows.start, start + rows.stop)
            each = [batch[number] for batch in batches]
            parts.append(WeighedRows(f"{label(matmul)}/rows {rows.start}", own, each))
        start += n
    return parts


def joined_solutions(parts: Sequence[Solution]) -> Solution:
    """The solutions of rows under each other as one; of numbers among notes, the mean."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return Solution(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra},
        parts[0].shared,
        notes=tuple(_mean(notes) for notes in zip(*(part.notes for part in parts), strict=True)),
    )


def _mean(notes: Sequence[str | int | float | None]) -> str | int | float | None:
    numbers = [note for note in notes if isinstance(note, float)]
    return sum(numbers) / len(numbers) if len(numbers) == len(notes) else notes[0]
