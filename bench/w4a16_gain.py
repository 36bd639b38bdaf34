"""Predicted gains of W4A16 kernels of two designs, over a grid of shapes that nothing is fitted to.

"two-phase": all vector cores dequantize the whole weight into a float16 workspace, then cube cores
multiply, and Split-K's partial sums are added in the same launch. The abstract of He et al., "W4A16
Mixed-Precision Matrix Multiplication on Decoupled Architecture" (arXiv 2601.16536), names these
steps; whether its phases overlap it does not say. "panguq's": vector cores hand each tile over
through a buffer and scale its sums, both of a pair, or one with Split-K, where the program that
arrives last adds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.timings import read
from panguq.ir.quant_spec import SCHEMES
from panguq.kernels.ascend.own.tiles import legal_tiles
from panguq.lowering.ascend.candidates import split_counts
from panguq.lowering.ascend.cost.executions import own_execution
from panguq.lowering.ascend.cost.model import cost, execution_cost
from panguq.lowering.problem import Candidate, KernelSchedule, MatmulProblem, Tile
from panguq.lowering.target import Target

TOKENS = (1, 4, 16, 64)
DEEP = 4  # k at least so many times n counts as K >> N
# The two phases do not share UB, so tiles are those of a float16 matmul.
TWO_PHASE_TILES: tuple[Tile, ...] = (
    (16, 256, 256),
    (32, 256, 256),
    (64, 256, 256),
    (64, 128, 256),
    (128, 128, 256),
    (128, 256, 256),
)


@dataclass(frozen=True)
class Gain:
    """One shape: microseconds of the best tile without and with Split-K, and of float16."""

    m: int
    n: int
    k: int
    whole_us: float
    split_us: float
    float_us: float

    @property
    def over_data_parallel(self) -> float:
        """How many times faster Split-K is."""
        return self.whole_us / self.split_us

    @property
    def over_float(self) -> float:
        """How many times faster than float16 the better schedule is."""
        return self.float_us / min(self.whole_us, self.split_us)


def gains(target: Target, two_phase: bool) -> list[Gain]:
    """Every shape of the grid with every m, group size 128, float16."""
    found = []
    for row in read("w4a16_grid.csv"):
        for m in TOKENS:
            n, k = int(row["n"]), int(row["k"])
            problem = MatmulProblem(m, n, k, SCHEMES["W4A16"], dtype="float16")
            plain = MatmulProblem(m, n, k, SCHEMES["FLOAT"], dtype="float16")
            splits = split_counts(int(target["cube_cores"]))
            whole = _best_us(problem, target, two_phase, [1])
            split = _best_us(problem, target, two_phase, splits)
            found.append(
                Gain(m, n, k, whole, split, cost(Candidate("linear"), plain, target).total_us)
            )
    return found


def _best_us(
    problem: MatmulProblem, target: Target, two_phase: bool, splits: Iterable[int]
) -> float:
    totals = []
    for count in splits:
        schedule: KernelSchedule = "split_k" if count > 1 else "data_parallel"
        tiles = TWO_PHASE_TILES if two_phase else legal_tiles(f"w4a16_{schedule}")
        for tile in tiles:
            if count > -(-problem.k // tile[2]):
                continue
            candidate = Candidate(f"w4a16_{schedule}", None, schedule, count, tile, "int4")
            if two_phase:
                execution = own_execution(candidate, problem, target, "workspace", 2, all_add=True)
            else:
                execution = own_execution(candidate, problem, target)
            totals.append(execution_cost(execution, problem, target).total_us)
    return min(totals)


def spread(values: Sequence[float]) -> str:
    """Minimum, median and maximum."""
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def deep(found: Sequence[Gain]) -> list[Gain]:
    """The shapes with K >> N."""
    return [gain for gain in found if gain.k >= DEEP * gain.n]
