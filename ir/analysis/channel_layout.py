"""How a tensor's elements map to channels: the bookkeeping behind `ir/analysis/channels.py`.

An element at index (i0, i1, …) belongs to the channel `base + steps[0][i0] + steps[1][i1] + …`,
where a dim without steps adds nothing; a negative sum means that the element carries no scale.
Sums of steps are closed under what models do to channels: a transpose permutes the dims, a
reshape merges or splits them (`[…, 32]` to `[…, 4 heads, 8]`), repeated heads repeat steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

UNSCALED = -(2**40)  # added to a channel number, it keeps the sum negative

Size = int | torch.SymInt


@dataclass(frozen=True, eq=False)
class Layout:
    """`steps[d]` is an integer vector as long as dim d, starting with 0, or None for all 0."""

    base: int
    steps: tuple[Tensor | None, ...]

    @staticmethod
    def of(base: int, steps: Sequence[Tensor | None]) -> Layout:
        """The layout in normal form: every first step is moved into the base."""
        normal: list[Tensor | None] = []
        if any(step is not None and not step.numel() for step in steps):
            return Layout(UNSCALED, (None,) * len(steps))  # nothing is there to be scaled
        for step in steps:
            if step is not None:
                base += int(step[0])
                step = step - step[0]
            varies = step is not None and bool(step.any())
            normal.append(step if varies else None)
        return Layout(base, tuple(normal))

    @staticmethod
    def last(channels: Tensor, rank: int) -> Layout:
        """A tensor of this rank whose last dim is these channels."""
        return Layout.of(0, [*[None] * (rank - 1), channels])

    @property
    def rank(self) -> int:
        """Number of dims."""
        return len(self.steps)

    @property
    def is_unscaled(self) -> bool:
        """Whether no element carries a scale."""
        return self.base + sum(int(s.max()) for s in self.steps if s is not None) < 0

    def matches(self, other: Layout) -> bool:
        """Whether both map every index to the same channel."""
        if (self.base, self.rank) != (other.base, other.rank):
            return False
        pairs = zip(self.steps, other.steps, strict=True)
        return all(a is b or (a is not None and b is not None and a.equal(b)) for a, b in pairs)

    def grid(self) -> Tensor:
        """Every index's channel, with size 1 where a dim adds nothing; negative: unscaled."""
        total = torch.full([1] * self.rank, self.base)
        for dim, step in enumerate(self.steps):
            if step is not None:
                shape = [1] * self.rank
                shape[dim] = len(step)
                total = total + step.view(shape)
        return total

    def channels(self) -> Tensor:
        """The channels that occur, ascending."""
        grid = self.grid()
        return grid[grid >= 0].unique()

    def along(self, dim: int, size: int) -> Tensor | None:
        """Index along `dim` to channel, -1 for unscaled; None if other dims matter as well."""
        dim %= self.rank
        if any(s is not None for d, s in enumerate(self.steps) if d != dim):
            return None
        step = self.steps[dim]
        index = self.base + (torch.zeros(size, dtype=torch.long) if step is None else step)
        return index.clamp_min(-1)

    def permuted(self, dims: Sequence[int]) -> Layout:
        """After `permute(dims)`."""
        return Layout(self.base, tuple(self.steps[d] for d in dims))

    def taken(self, dim: int, index: Tensor | slice) -> Layout:
        """After taking these indices along `dim`."""
        step = self.steps[dim]
        if step is None:
            return self
        return Layout.of(self.base, [*self.steps[:dim], step[index], *self.steps[dim + 1 :]])

    def without(self, dim: int) -> Layout:
        """After dropping a dim that adds nothing."""
        return Layout(self.base, (*self.steps[:dim], *self.steps[dim + 1 :]))

    def padded(self, rank: int) -> Layout:
        """With dims put in front, as broadcasting does."""
        return Layout(self.base, (*[None] * (rank - self.rank), *self.steps))

    def reshaped(self, old: Sequence[Size], new: Sequence[Size]) -> Layout | None:
        """After a reshape from shape `old` to `new`; None if channels would not stay sums."""
        steps: list[Tensor | None] = []
        for before, after in _matching_dims(old, new):
            group = [self.steps[d] for d in before]
            if all(step is None for step in group):
                steps.extend([None] * len(after))
                continue
            sizes = [old[d] for d in before], [new[d] for d in after]
            if not all(isinstance(size, int) for side in sizes for size in side):
                return None
            split = _split(_merge(group, sizes[0]), sizes[1])
            if split is None:
                return None
            steps.extend(split)
        return Layout.of(self.base, steps)


def _merge(steps: Sequence[Tensor | None], sizes: Sequence[Size]) -> Tensor:
    merged = torch.zeros(1, dtype=torch.long)
    for step, size in zip(steps, sizes, strict=True):
        part = torch.zeros(int(size), dtype=torch.long) if step is None else step
        merged = (merged[:, None] + part).flatten()
    return merged


def _split(merged: Tensor, sizes: Sequence[Size]) -> list[Tensor | None] | None:
    steps: list[Tensor | None] = []
    for size in sizes:
        grid = merged.view(int(size), -1)
        outer, merged = grid[:, 0], grid[0]
        if not grid.equal(outer[:, None] + merged):  # the first step is 0 here
            return None
        steps.append(outer)
    return steps


def _matching_dims(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """The finest groups of old and new dims that hold the same elements, in order."""
    ends_old, ends_new = _products(old), _products(new)
    groups: list[tuple[list[int], list[int]]] = []
    first_old = first_new = 0
    for i, end in enumerate(ends_old):
        j = next((j for j in range(first_new, len(new)) if ends_new[j] == end), None)
        if j is not None:
            groups.append((list(range(first_old, i + 1)), list(range(first_new, j + 1))))
            first_old, first_new = i + 1, j + 1
    if first_old < len(old) or first_new < len(new):  # sizes of 1 at the end
        rest_old, rest_new = list(range(first_old, len(old))), list(range(first_new, len(new)))
        if groups:
            groups[-1] = (groups[-1][0] + rest_old, groups[-1][1] + rest_new)
        else:
            groups.append((rest_old, rest_new))
    return groups


def _products(sizes: Sequence[Size]) -> list[sympy.Expr]:
    product: sympy.Expr = sympy.Integer(1)
    products = []
    for size in sizes:
        factor = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
        product = sympy.expand(product * factor)
        products.append(product)
    return products
