"""What the passes share that choose each row's codes by itself, from the second moments alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from panguq.decibels import decibels
from panguq.passes.codes.gram import InputMoments
from panguq.passes.codes.solve_weights import SolveWeights
from panguq.passes.codes.weighed_rows import joined_solutions
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.ranks import ranks

ROWS_AT_ONCE = 512  # fewer would cost more in calls than they save by being shared


class SolvedRows(NamedTuple):
    """The solution of some rows, and sums over them.

    `squares`: of the output on the calibration data, then of its error with each of some codes.
    `notes`: the method's other columns of the table, in the mean over rows.
    """

    solution: Solution
    squares: Sequence[float]
    notes: tuple[float, ...] = ()


@dataclass(frozen=True)
class SolveRows(SolveWeights):
    """Before: `quantize_weight(w, scale, zero_point)`.  After: codes that `solve_rows` chose.

    A weight is solved at most `ROWS_AT_ONCE` rows at a time, which ranks divide among each other:
    each has its share of the inputs, and gets the second moments of all.
    """

    divided: ClassVar[bool] = True
    divides_rows: ClassVar[bool] = True

    def solve_rows(self, problem: WeightProblem, moments: InputMoments) -> SolvedRows:
        """The codes of some rows, which need nothing but the `moments` of their inputs."""
        raise NotImplementedError

    def solve(self, problem: WeightProblem) -> Solution:
        """The codes of all rows, and as first notes their relative squared errors in dB."""
        moments = problem.moments or InputMoments(problem.inputs)
        moments.together()
        own = replace(problem, moments=moments)
        if problem.moments is None:  # what decides about rows is then the same for any ranks
            own = replace(own, inputs=(), float_inputs=())
        count = -(-len(problem.weight) // ROWS_AT_ONCE)
        pieces = [replace(own, weight=rows) for rows in problem.weight.tensor_split(count)]

        def solve(piece: WeightProblem) -> SolvedRows:
            return self.solve_rows(piece, moments)

        found = ranks().each(pieces, lambda piece: len(piece.weight), solve)
        signal, *errors = (sum(part) for part in zip(*(f.squares for f in found), strict=True))
        relative = (decibels(error / signal) if signal > 0 else -300.0 for error in errors)
        sizes = [len(piece.weight) for piece in pieces]
        notes = (_mean(same, sizes) for same in zip(*(f.notes for f in found), strict=True))
        return replace(joined_solutions([f.solution for f in found]), notes=(*relative, *notes))


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean over rows of what pieces of these sizes have; exact where they agree."""
    if len(set(values)) == 1:
        return values[0]
    return sum(v * size for v, size in zip(values, sizes, strict=True)) / sum(sizes)
