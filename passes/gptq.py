"""GPTQ: choose a weight's codes column by column, each making up for the errors before it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from panguq.decibels import decibels
from panguq.errors import RecipeError
from panguq.passes.codes.column_solver import FitScale, GroupGrid, solve_columns
from panguq.passes.codes.gram import InputMoments, output_error
from panguq.passes.codes.solve_rows import SolvedRows, SolveRows
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.passes.codes.weight_scales import (
    check_clip_search,
    clip_ratios,
    min_max_scale,
    quantize_groups,
    search_scale,
    storable,
)

ROWS_COMPARED = 128  # all would cost as much as the factor, for the third digit of a table


@dataclass(frozen=True)
class Gptq(SolveRows):
    """Before: `quantize_weight(w, scale, zero_point)`.  After: integer codes read from storage.

    The codes Q make tr((Q - W) H (Q - W)^T) small, the squared error of the matmul's output on the
    calibration data: H = X^T X with the inputs X as they are when all weights before are
    quantized, and activations too where the scheme says so. Column after column is rounded to
    nearest and its error spread over those that follow (`solve_columns`; arXiv 2210.17323).

    - Each entry of H's diagonal is multiplied by 1 + `damping`, so that all correlations of inputs
      shrink alike (`inverse_factor`). Each time the Cholesky factorization fails, `damping` grows
      tenfold, which the table shows. Correlations measured on some thousand tokens of one kind of
      text are noise to a good part: the authors' 0.01 of the mean diagonal fits them, and text of
      another kind is then no better off than after rounding to nearest. 1 is the most cautious
      value that still gave the best results on SmolLM2-135M (docs/quantization.md).
    - An input that is always zero neither gives nor takes errors, and its weights are rounded to
      nearest: the authors' code sets them to zero, which other data may punish.
    - `static_groups` fits the scales of all groups to the weight as it was, else each when its
      first column comes, to the weight as updated by then.
    - `act_order` rounds columns by falling mean square of their input, while later ones can still
      make up for them. Storage keeps its order; without static groups the groups come by falling
      mean square, each with its columns in that order.
    - `clip_search`, `importance`, `smallest_ratio` and `steps` fit scales as in quantize-weights;
      without it they come from smallest and largest weights.

    The table shows the output's relative squared error, after rounding to nearest on the
    weight's own scales and after this pass, over at most `ROWS_COMPARED` of the outputs that are
    solved at once (`ROWS_AT_ONCE`), evenly spaced.
    """

    name: ClassVar[str] = "gptq"
    takes_experts: ClassVar[bool] = True
    note_columns: ClassVar[tuple[str, ...]] = ("rtn_error_db", "error_db", "damping")
    act_order: bool = True
    static_groups: bool = True
    damping: float = 1.0
    block_size: int = 128
    clip_search: bool = True
    importance: Literal["activations", "none"] = "activations"
    smallest_ratio: float = 0.6
    steps: int = 9

    def __post_init__(self) -> None:
        if not 0.0 <= self.damping < math.inf:
            raise RecipeError(f"{self.name}: damping {self.damping} must be 0 or more", "try 0.01")
        if self.block_size < 1:
            raise RecipeError(f"{self.name}: block_size {self.block_size} must be at least 1")
        check_clip_search(self.name, self.smallest_ratio, self.steps)

    def solve_rows(self, problem: WeightProblem, moments: InputMoments) -> SolvedRows:
        """The codes of GPTQ; raises NumericsError if the inputs' second moments overflow."""
        hessian = moments.hessian
        order = self.column_order(hessian.diagonal(), problem.group_size)
        inverse = moments.inverse(self.damping, order)
        fitted = self.fitted(problem, hessian)
        grid = self.grid(problem, hessian, order, fitted)
        solve_columns(problem.weight[:, order], inverse.factor, grid, self.block_size)
        solution = Solution(*grid.solution())
        squares = self.squares(problem, hessian, solution, fitted)
        return SolvedRows(solution, squares, (inverse.damping,))

    def squares(
        self,
        problem: WeightProblem,
        hessian: Tensor,
        solution: Solution,
        fitted: tuple[Tensor, Tensor | None],
    ) -> list[float]:
        """The squared output of some rows, and its squared error: rounded to nearest with `fitted`
        scales, and of the solution."""
        some = slice(None, None, -(-len(problem.weight) // ROWS_COMPARED))
        weight, (scale, zero) = problem.weight[some], fitted
        groups = weight.unflatten(1, (-1, problem.group_size))
        grid = scale[some], None if zero is None else zero[some]
        nearest = quantize_groups(groups, *grid, problem.spec).flatten(1)
        chosen = self.dequantize(problem, solution.rows(some)).float()
        return squared_outputs(weight, (nearest, chosen), hessian, problem.inputs)

    def column_order(self, mean_square: Tensor, group_size: int) -> Tensor:
        """The weight's columns `[k]` in the order in which they are rounded."""
        if not self.act_order:
            return torch.arange(len(mean_square))
        if self.static_groups:
            return mean_square.argsort(descending=True, stable=True)
        groups = mean_square.unflatten(0, (-1, group_size))
        within = groups.argsort(dim=1, descending=True, stable=True)
        first = groups.sum(1).argsort(descending=True, stable=True)
        return (within + torch.arange(len(groups))[:, None] * group_size)[first].flatten()

    def grid(
        self,
        problem: WeightProblem,
        hessian: Tensor,
        order: Tensor,
        fitted: tuple[Tensor, Tensor | None],
    ) -> GroupGrid:
        """The codes' grid: that of `fitted` with static groups, else fitted as the groups come."""
        shape = (problem.weight.shape[0], problem.weight.shape[1])
        if self.static_groups:
            scale, zero = fitted
            return GroupGrid(
                shape, problem.group_size, problem.spec, scale=scale, zero_point=zero, order=order
            )
        fit = self._fit_group(problem, hessian)
        return GroupGrid(shape, problem.group_size, problem.spec, fit=fit, order=order)

    def fitted(self, problem: WeightProblem, hessian: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point `[n, k / group_size]` for the weight as it is."""
        return self._scale(problem, problem.weight, hessian.diagonal())

    def _fit_group(self, problem: WeightProblem, hessian: Tensor) -> FitScale:
        size = problem.group_size

        def fit(group: int, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            mean_square = hessian.diagonal()[group * size : (group + 1) * size]
            scale, zero = self._scale(problem, weight, mean_square)
            return scale[:, 0], None if zero is None else zero[:, 0]

        return fit

    def _scale(
        self, problem: WeightProblem, weight: Tensor, mean_square: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        weight = weight.float()
        if self.clip_search:
            importance = mean_square if self.importance == "activations" else None
            ratios = clip_ratios(self.smallest_ratio, self.steps)
            scale, zero = search_scale(weight, problem.group_size, problem.spec, importance, ratios)
        else:
            scale, zero = min_max_scale(weight, problem.group_size, problem.spec)
        return storable(scale, problem.dtype, above=True), zero


def relative_errors_db(
    weight: Tensor, candidates: Sequence[Tensor], hessian: Tensor, inputs: Sequence[Tensor] = ()
) -> tuple[float, ...]:
    """10 log10 of a matmul's squared output error over its squared output, -300 for nothing, with
    each of the candidates in place of `weight`. Arguments as of `squared_outputs`."""
    signal, *errors = squared_outputs(weight, candidates, hessian, inputs)
    return tuple(decibels(error / signal) if signal > 0 else -300.0 for error in errors)


def squared_outputs(
    weight: Tensor, candidates: Sequence[Tensor], hessian: Tensor, inputs: Sequence[Tensor] = ()
) -> list[float]:
    """A matmul's squared output, and its squared error with each of the candidates in place of
    `weight`, all `[n, k]`.

    `inputs`: the batches `[..., k]` that `hessian` `[k, k]` is of. Where they have fewer tokens
    than k they take its place, since multiplying by them is less work. In float32: the digits of a
    table need no more.
    """
    compared = itertools.chain((weight,), (candidate - weight for candidate in candidates))
    tokens = sum(batch.numel() // batch.shape[-1] for batch in inputs)
    if 0 < tokens < len(hessian):
        rows = torch.cat([batch.reshape(-1, batch.shape[-1]).float() for batch in inputs])
        squared = [(w @ rows.T).square_().sum(1) for w in compared]
    else:
        moments = hessian.float()
        squared = [output_error(w, moments) for w in compared]
    return [float(of_rows.double().sum()) for of_rows in squared]
