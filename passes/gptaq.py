"""GPTAQ: GPTQ that also makes up for what quantization before the matmul did to its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from panguq.decibels import decibels
from panguq.errors import RecipeError
from panguq.passes.codes.column_solver import GroupGrid, solve_columns
from panguq.passes.codes.gram import cross_gram, gram, inverse_factor
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.passes.gptq import Gptq


@dataclass(frozen=True)
class Gptaq(Gptq):
    """Before: `quantize_weight(w, scale, zero_point)`.  After: integer codes read from storage.

    As gptq, but the codes Q make `|Q X - W X_float|^2` small: what the float model computes, from
    its own inputs X_float, is the goal, and not what the float weight makes of the inputs X that
    come from quantized matmuls (arXiv 2504.02692). With `D = (X_float - X) X^T`, `H = X X^T`,
    `U^T U = H^-1` and `P = alpha striu(D U^T) U`, every column w_j that is rounded also adds
    `w_j P_ji` to each later column i: what they can do, by least squares, about the deviation of
    input j.

    The paper derives `alpha` 1; its authors' code takes 0.25, which is the default here too,
    since D is measured on few tokens and the full answer follows their noise as well.

    The method may diverge, above all at 2 bits. GPTQ's codes are made too, and where GPTAQ's are
    not finite or leave a larger `|Q X - W X_float|^2` on the calibration data, GPTQ's are kept;
    the table's `fallback` says so. Its `target_error_db` is that error relative to
    `|W X_float|^2`, `gptq_target_error_db` the same with GPTQ's codes.
    """

    name: ClassVar[str] = "gptaq"
    beside_float: ClassVar[bool] = True
    divided: ClassVar[bool] = False
    note_columns: ClassVar[tuple[str, ...]] = (
        *Gptq.note_columns,
        "gptq_target_error_db",
        "target_error_db",
        "fallback",
    )
    alpha: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise RecipeError(f"gptaq: alpha {self.alpha} must lie in [0, 1]", "try 0.25")

    def solve(self, problem: WeightProblem) -> Solution:
        """The codes of GPTAQ, or GPTQ's where those are better."""
        target = AsymmetricTarget.of(problem.inputs, problem.float_inputs)
        order = self.column_order(target.hessian.diagonal(), problem.group_size)
        inverse = inverse_factor(target.hessian, self.damping, order)
        factor = inverse.factor
        pull = (target.cross[order][:, order] @ factor.T).triu(1) @ factor * self.alpha
        fitted = self.fitted(problem, target.hessian)

        def attempt(pull: Tensor | None) -> tuple[Solution, float]:
            grid = self.grid(problem, target.hessian, order, fitted)
            return self._attempt(problem, target, grid, order, factor, pull)

        plain, plain_db = attempt(None)
        pulled, pulled_db = attempt(pull)
        fallback = ""
        if not pulled_db <= plain_db:
            fallback = "gptq: larger error" if pulled_db < math.inf else "gptq: not finite"
            pulled, pulled_db = plain, plain_db
        signal, *left = self.squares(problem, target.hessian, pulled, fitted)
        errors = (decibels(error / signal) if signal > 0 else -300.0 for error in left)
        return replace(pulled, notes=(*errors, inverse.damping, plain_db, pulled_db, fallback))

    def _attempt(
        self,
        problem: WeightProblem,
        target: AsymmetricTarget,
        grid: GroupGrid,
        order: Tensor,
        factor: Tensor,
        pull: Tensor | None,
    ) -> tuple[Solution, float]:
        """A solution and its relative error in dB, infinite if the loop's values are not finite."""
        values = solve_columns(problem.weight[:, order], factor, grid, self.block_size, pull)
        solution = Solution(*grid.solution())
        if not values.isfinite().all():
            return solution, math.inf
        return solution, target.error_db(problem.weight, self.dequantize(problem, solution))


class AsymmetricTarget(NamedTuple):
    """Second moments `[k, k]`, float64, of inputs X and of their deviations E = X_float - X:
    `hessian` X X^T, `cross` E X^T, `deviation` E E^T."""

    hessian: Tensor
    cross: Tensor
    deviation: Tensor

    @staticmethod
    def of(inputs: Sequence[Tensor], float_inputs: Sequence[Tensor]) -> AsymmetricTarget:
        """The moments of batches `[..., k]` and of the same batches in the float model."""
        pairs = [(f.float() - x.float(), x) for x, f in zip(inputs, float_inputs, strict=True)]
        return AsymmetricTarget(gram(inputs), cross_gram(pairs), gram(e for e, _ in pairs))

    def error_db(self, weight: Tensor, values: Tensor) -> float:
        """10 log10 of |Q X - W X_float|^2 / |W X_float|^2 for Q `values` and W `weight` `[n, k]`.

        Q X - W X_float = dW X - W E with dW = Q - W; -300 for nothing.
        """
        weight = weight.double()
        change = values.double() - weight
        across = weight @ self.cross
        constant = ((weight @ self.deviation) * weight).sum()
        error = ((change @ self.hessian - 2 * across) * change).sum() + constant
        signal = ((weight @ self.hessian + 2 * across) * weight).sum() + constant
        if not signal > 0:
            return -300.0
        ratio = float(error / signal)
        return decibels(ratio) if math.isfinite(ratio) else math.inf
