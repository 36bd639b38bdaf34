"""Choose an NPU's kernels for a matmul: the stored weight once, the kernel for every m."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from panguq.lowering.ascend.candidates import ascend_candidates
from panguq.lowering.ascend.cost.envelope import ranges, survivors
from panguq.lowering.ascend.cost.model import total_us
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.choice import DECODE_M, LARGEST_M, PREFILL_M, Choice, TableEntry, TokenMix
from panguq.lowering.problem import Candidate, MatmulProblem, Storage
from panguq.lowering.target import Floats


def select_ascend(
    problem: MatmulProblem,
    target: AscendMachine,
    mix: TokenMix,
    allow_float: bool,
    hysteresis: float,
) -> Choice:
    """The storage of least cost over the mix, and a table over m of kernels that read it.

    Raises LoweringError, with every candidate's refusal, if none is legal.
    """
    candidates = ascend_candidates(problem, target, allow_float)
    legal = target.legal(candidates, problem)
    weights = mix.weights() if problem.m is None else {problem.m: 1.0}
    storage_us = _storage_costs(legal, problem, target, weights)
    storage = min(storage_us, key=lambda name: storage_us[name])
    same = [c for c in legal if c.storage == storage]
    if problem.m is None:
        table = _table(same, problem, target, hysteresis)
    else:
        best = int(total_us(same, problem, target, np.array([problem.m]))[:, 0].argmin())
        table = [TableEntry(problem.m, problem.m, same[best])]
    ends = [problem.m, problem.m] if problem.m is not None else [DECODE_M, PREFILL_M]
    costs = total_us(legal, problem, target, np.array(ends))
    winners = [_at(table, m) for m in ends]
    decode_us, prefill_us = (
        float(costs[legal.index(winner), i]) for i, winner in enumerate(winners)
    )
    return Choice(
        kernel=table[0].candidate.kernel,
        precision=problem.precision,
        few_tokens=0,
        losers=_losers(candidates, legal, costs, {e.candidate.kernel for e in table}, ends),
        decode_us=decode_us,
        prefill_us=prefill_us,
        storage=storage,
        table=tuple(table),
        hysteresis=hysteresis,
        storage_us=tuple(storage_us.items()),
        weight_format=problem.weight_format,
    )


def _storage_costs(
    legal: Sequence[Candidate],
    problem: MatmulProblem,
    target: AscendMachine,
    weights: dict[int, float],
) -> dict[Storage, float]:
    """What the mix costs with each storage, if the cheapest of its kernels runs for each m."""
    tokens = np.array(list(weights))
    shares = np.array(list(weights.values()))
    result: dict[Storage, float] = {}
    for storage in dict.fromkeys(c.storage for c in legal):
        same = [c for c in legal if c.storage == storage]
        cheapest = total_us(same, problem, target, tokens).min(axis=0)
        result[storage] = float(cheapest @ shares)
    return result


def _table(
    same: Sequence[Candidate], problem: MatmulProblem, target: AscendMachine, hysteresis: float
) -> list[TableEntry]:
    def totals(rows: Sequence[int], tokens: NDArray[np.int64]) -> Floats:
        return total_us([same[row] for row in rows], problem, target, tokens)

    # CANN changes its kernel as m grows, so a vendor's cost may fall; ours never does.
    steady = [row for row, c in enumerate(same) if c.schedule != "vendor"]
    rows = survivors(totals, range(len(same)), steady, LARGEST_M, hysteresis)
    found = ranges(totals(rows, np.arange(1, LARGEST_M + 1)), hysteresis)
    table = [TableEntry(first + 1, last + 1, same[rows[row]]) for first, last, row in found]
    last = table.pop()
    return [*table, TableEntry(last.first_m, None, last.candidate)]


def _at(table: Sequence[TableEntry], m: int) -> Candidate:
    return next(e.candidate for e in table if e.last_m is None or m <= e.last_m)


def _losers(
    candidates: Sequence[Candidate],
    legal: Sequence[Candidate],
    costs: Floats,
    winners: set[str],
    ends: Sequence[int],
) -> tuple[tuple[str, str], ...]:
    """Each other op once: its cheapest costs, or its first refusal."""
    result: dict[str, str] = {}
    for candidate in candidates:
        if candidate.kernel in winners or candidate.kernel in result:
            continue
        rows = [i for i, c in enumerate(legal) if c.kernel == candidate.kernel]
        if rows:
            decode, prefill = costs[rows].min(axis=0)
            text = f"{decode:.0f} us at m={ends[0]}"
            result[candidate.kernel] = (
                text if ends[0] == ends[1] else f"{text}, {prefill:.0f} us at m={ends[1]}"
            )
        else:
            result[candidate.kernel] = str(candidate.refusal)
    return tuple(result.items())
