"""What a kernel is expected to cost. A wrong cost makes a slow choice, never a wrong result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from panguq.errors import LoweringError
from panguq.lowering.ascend.cost.executions import Execution, executions
from panguq.lowering.ascend.cost.terms import (
    OVERLAPPED,
    SERIAL,
    TERMS,
    Form,
    compiled,
)
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.measured import corrected, how_known, measured_for
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.target import Cost, Floats


def cost(candidate: Candidate, problem: MatmulProblem, target: AscendMachine) -> Cost:
    """The cost of a call. Raises LoweringError if the problem does not fix m."""
    if problem.m is None:
        raise LoweringError(
            "a cost needs a number of tokens, and m is symbolic",
            "give m, or select a kernel over a mix of m",
        )
    best = _cheapest(candidate, problem, target)
    how = how_known(measured_for(target.measured, candidate, problem), problem.m)
    if not how:
        return best
    m = np.array([problem.m])
    us = float(total_us([candidate], problem, target, m)[0, 0])
    scaled = {name: term * us / best.total_us for name, term in best.terms.items()}
    return Cost(us, scaled, f"{how}; predicted were {best.total_us:.1f} us", best.overlapped)


def _cheapest(candidate: Candidate, problem: MatmulProblem, target: AscendMachine) -> Cost:
    """The cheapest way to run a candidate, for the problem's m."""
    assert problem.m is not None
    by_form: dict[Form, list[Execution]] = defaultdict(list)
    for execution in executions(candidate, problem, target):
        if _covers(execution, problem.m):
            by_form[execution.form].append(execution)
    m = np.array([float(problem.m)])
    best = []
    for form, found in by_form.items():
        named = dict(zip(TERMS, _term_arrays(form, found, problem, target, m), strict=True))
        best.append(found[int(_totals(named).argmin())])
    return min((execution_cost(e, problem, target) for e in best), key=lambda c: c.total_us)


def execution_cost(execution: Execution, problem: MatmulProblem, target: AscendMachine) -> Cost:
    """The cost of one way to run the matmul, for the problem's m."""
    assert problem.m is not None
    m = np.array([float(problem.m)])
    values = [v[0, 0] for v in _term_arrays(execution.form, [execution], problem, target, m)]
    named = {name: float(value) for name, value in zip(TERMS, values, strict=True)}
    total = sum(named[name] for name in SERIAL) + max(named[name] for name in OVERLAPPED)
    return Cost(total, named, execution.label, OVERLAPPED)


def total_us(
    candidates: Sequence[Candidate],
    problem: MatmulProblem,
    target: AscendMachine,
    tokens: NDArray[np.int64],
) -> Floats:
    """Microseconds `[candidates, tokens]` of every candidate for every m in `tokens`."""
    result: Floats = np.full((len(candidates), len(tokens)), np.inf)
    by_form: dict[Form, list[tuple[int, Execution]]] = defaultdict(list)
    for row, candidate in enumerate(candidates):
        for execution in executions(candidate, problem, target):
            by_form[execution.form].append((row, execution))
    for form, pairs in by_form.items():
        rows = [row for row, _ in pairs]
        found = [execution for _, execution in pairs]
        named = dict(
            zip(
                TERMS, _term_arrays(form, found, problem, target, tokens.astype(float)), strict=True
            )
        )
        totals = _totals(named)
        for position, execution in enumerate(found):
            outside = tokens < execution.first_m
            if execution.last_m is not None:
                outside |= tokens > execution.last_m
            totals[position, outside] = np.inf
        np.minimum.at(result, rows, totals)
    if target.measured and not problem.experts:
        plain = replace(target, measured=())
        for row, candidate in enumerate(candidates):
            same = measured_for(target.measured, candidate, problem)
            if same:
                known = np.array([entry.m for entry in same])
                at = total_us([candidate], problem, plain, known)[0]
                result[row] = corrected(result[row], tokens.tolist(), same, at)
    return result


def _totals(named: dict[str, Floats]) -> Floats:
    """The serial terms and the largest of the overlapped, of arrays of terms."""
    overlapped = np.max(np.stack([named[name] for name in OVERLAPPED]), axis=0)
    totals: Floats = sum((named[name] for name in SERIAL), np.zeros((1, 1))) + overlapped
    return totals


def _covers(execution: Execution, m: int) -> bool:
    return execution.first_m <= m and (execution.last_m is None or m <= execution.last_m)


def _term_arrays(
    form: Form,
    found: Sequence[Execution],
    problem: MatmulProblem,
    target: AscendMachine,
    tokens: Floats,
) -> list[Floats]:
    """The terms `[executions, tokens]`, in the order of `TERMS`."""
    shape = (len(found), len(tokens))
    columns = np.array([e.arguments(problem, target) for e in found], dtype=float).T[:, :, None]
    values = compiled(form, target.chip.fractal)(tokens[None, :], *columns)
    return [np.broadcast_to(np.asarray(value, dtype=float), shape) for value in values]


def at(problem: MatmulProblem, m: int) -> MatmulProblem:
    """The problem for a fixed number of tokens."""
    return replace(problem, m=m)
