"""The column loop of GPTQ's family: columns are rounded in turn, later ones make up for each error.

The weight is worked on as `[k, n]`, so that a column of it lies in one piece, and in two levels of
blocks: an error meets the next columns of its stripe one by one, the rest of its block in a small
matrix product, and everything behind the block in a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from panguq.ir.quant_spec import QuantSpec

STRIPE = 32  # columns that are updated one by one

FitScale = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
"""(group, its weights `[n, size]`) -> scale, as stored, and zero point `[n]` of the group."""


class Rounder(Protocol):
    """Rounds columns to a grid, which it may choose when it first sees a unit of columns.

    Columns are counted in the order in which they are solved.
    """

    unit: int

    def begin(self, start: int, columns: Tensor) -> None:
        """Sees columns `start` to `start + unit`, as `[unit, n]`, updated by all before them."""

    def round(self, column: int, weight: Tensor) -> Tensor:
        """The values `[n]` that stand for a column `[n]`, whose updates are complete."""


def solve_columns(
    weight: Tensor,
    factor: Tensor,
    rounder: Rounder,
    block: int = 128,
    pull: Tensor | None = None,
    inside: bool = True,
) -> Tensor:
    """Round all columns of `weight` `[n, k]`; returns the values `[n, k]` that stand for them.

    `factor` U `[k, k]` is upper triangular with U^T U = H^-1: a column w_j that gets the value v_j
    has the error `e_j = (w_j - v_j) / U_jj`, and tr(dW H dW^T) grows least, by |e_j|^2, if
    every later column i becomes `w_i - e_j U_ji` (arXiv 2210.17323, equations 2 to 4).
    `pull` P `[k, k]`, strictly upper triangular, also adds `w_j P_ji` to them, with w_j as it was
    when it was rounded (arXiv 2504.02692).

    `inside=False` spreads errors behind their block only, as methods do that round whole blocks.
    Computes in the weight's dtype: float32 has room enough, since an update's rounding error,
    2^-24 of the weight, is far below half a step of the widest grid, 2^-9 of it.
    """
    n, k = weight.shape
    values = weight.T.contiguous()  # what is not rounded yet holds the updated weight
    spread = factor.to(values.dtype)
    diagonal = spread.diagonal().tolist()
    if pull is not None:
        # w_j = v_j + e_j U_jj, so that both updates are known from values and errors.
        pull = pull.to(values.dtype)
        spread = spread - spread.diagonal()[:, None] * pull
    for start, stop in _split(0, k, block, rounder.unit):
        errors = values.new_empty(stop - start, n)
        for left, right in _split(start, stop, STRIPE if inside else block, rounder.unit):
            if left % rounder.unit == 0:
                rounder.begin(left, values[left : left + rounder.unit])
            for j in range(left, right):
                column = values[j]
                value = rounder.round(j, column)
                error = torch.sub(column, value, out=errors[j - start]).div_(diagonal[j])
                column.copy_(value)
                if inside:
                    values[j + 1 : right].addr_(spread[j, j + 1 : right], error, alpha=-1)
                    if pull is not None:
                        values[j + 1 : right].addr_(pull[j, j + 1 : right], value)
            if inside:
                _update(values, errors[left - start : right - start], spread, pull, right, stop)
        _update(values, errors, spread, pull, stop, k)
    return values.T


def _update(
    values: Tensor, errors: Tensor, spread: Tensor, pull: Tensor | None, start: int, stop: int
) -> None:
    """Make columns `start` to `stop` up for `errors` `[size, n]` of the columns right before
    them, or before `start` of their block."""
    done = slice(start - len(errors), start)
    values[start:stop].addmm_(spread[done, start:stop].T, errors, alpha=-1)
    if pull is not None:
        values[start:stop].addmm_(pull[done, start:stop].T, values[done])


def _split(start: int, stop: int, size: int, unit: int) -> Iterator[tuple[int, int]]:
    """Pieces of at most `size` columns: whole units, or parts of one."""
    size = size // unit * unit or size
    while start < stop:
        end = min(start + size, stop)
        if size < unit:
            end = min(end, start - start % unit + unit)
        yield start, end
        start = end


class GroupGrid:
    """A Rounder to codes with a scale (and zero point) a group, which it keeps.

    `order` `[k]` is the weight's column behind each solved one, None for its own order.
    `fit` gives a group's scale when its first column comes, from the weights as updated by then;
    the columns of a group must then come together.
    With `scale` and `zero_point` `[n, k / group_size]` given, the grid is fixed and any order goes.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        group_size: int,
        spec: QuantSpec,
        fit: FitScale | None = None,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        n, k = shape
        self.unit = group_size
        self.spec = spec
        self.fit = fit
        self.order = list(range(k)) if order is None else order.tolist()
        self.codes = torch.empty(k, n, dtype=spec.format.storage)
        self.scales = [] if scale is None else list(scale.T.contiguous())
        self.zeros = [] if zero_point is None else list(zero_point.T.contiguous())
        if fit is not None:
            self.scales = [torch.empty(0)] * (k // group_size)
            self.zeros = [] if spec.symmetric else [torch.empty(0)] * (k // group_size)
        self.steps = [s.float() for s in self.scales]
        self.offsets = [z.float() for z in self.zeros]

    def begin(self, start: int, columns: Tensor) -> None:
        """Fit the group's scale, if there is none yet."""
        if self.fit is None:
            return
        group = self.order[start] // self.unit
        # In the order of the weight, so that importance of its columns applies.
        position = torch.tensor(self.order[start : start + self.unit]) - group * self.unit
        ordered = torch.empty_like(columns).index_copy_(0, position, columns)
        scale, zero = self.fit(group, ordered.T)
        self.scales[group], self.steps[group] = scale, scale.float()
        if zero is not None:
            self.zeros[group], self.offsets[group] = zero, zero.float()

    def round(self, column: int, weight: Tensor) -> Tensor:
        """clamp(round(w / scale) + zero_point), kept as a code and returned as a value.

        In a format that has no integers, encode(w / scale).
        """
        source = self.order[column]
        group = source // self.unit
        step = self.steps[group].to(weight.dtype)
        if not self.spec.is_integer:
            self.codes[source] = found = self.spec.format.encode(weight / step)
            return self.spec.format.decode(found).to(weight.dtype).mul_(step)
        code = (weight / step).round_()
        if not self.offsets:
            code.clamp_(self.spec.quant_min, self.spec.quant_max)
            self.codes[source] = code
            return code.mul_(step)
        offset = self.offsets[group]
        code.add_(offset).clamp_(self.spec.quant_min, self.spec.quant_max)
        self.codes[source] = code
        return code.sub_(offset).mul_(step)

    def solution(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes `[n, k]`, scale and zero point `[n, k / group_size]`, in weight order."""
        scale = torch.stack(self.scales, dim=1)
        zero = torch.stack(self.zeros, dim=1) if self.zeros else None
        return self.codes.T.contiguous(), scale, zero
