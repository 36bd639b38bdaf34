"""Choose kernels for a matmul: the cheapest legal ones, keeping the losers and their cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sympy import sympify

from panguq.errors import LoweringError
from panguq.lowering.candidates import ascend_candidates, cpu_candidates
from panguq.lowering.cost.envelope import ranges, survivors
from panguq.lowering.cost.model import Floats, M, cost_us, crossover_m, total_us
from panguq.lowering.problem import (
    Candidate,
    MatmulProblem,
    Precision,
    Storage,
    WeightFormat,
)
from panguq.lowering.target import Target

DECODE_M, PREFILL_M = 1, 512
# What a served request is made of: one prompt, then this many tokens one by one.
DECODE_STEPS = 256
BYTES, CONVERTED = "int8_weight_linear", "int8_weight_linear (converted)"
MANY_TOKENS = {BYTES: CONVERTED, "int4_linear": "dequantized_linear"}
"""What ops of the CPU target that take `few_tokens` cost beyond them, in `Target.kernels`."""
LARGEST_M = 8192
HYSTERESIS = 0.05


@dataclass(frozen=True)
class TokenMix:
    """How often a matmul sees how many tokens: decoding steps with 1 … 64 sequences, and prompts.

    The cost of a mix is `decode_weight · mean cost over decode + prefill_weight · mean cost over
    prefill`. Raises LoweringError for numbers of tokens below 1 and weights below 0.
    """

    decode: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    prefill: tuple[int, ...] = (512, 1024, 2048, 4096)
    decode_weight: float = float(DECODE_STEPS)
    prefill_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, tokens in (("decode", self.decode), ("prefill", self.prefill)):
            if any(not isinstance(m, int) or m < 1 for m in tokens):
                raise LoweringError(f"token mix: {name}: {tokens}: tokens are whole, from 1 up")
        for name, weight, tokens in (
            ("decode_weight", self.decode_weight, self.decode),
            ("prefill_weight", self.prefill_weight, self.prefill),
        ):
            if not math.isfinite(weight) or weight < 0:
                raise LoweringError(f"token mix: {name}: {weight} is not zero or more")
            if weight > 0 and not tokens:
                raise LoweringError(f"token mix: {name} is {weight}, but there are no tokens")
        if self.decode_weight + self.prefill_weight == 0:
            raise LoweringError("token mix: both weights are zero")

    def weights(self) -> dict[int, float]:
        """The weight of each number of tokens."""
        result: dict[int, float] = {}
        for tokens, weight in (
            (self.decode, self.decode_weight),
            (self.prefill, self.prefill_weight),
        ):
            for m in tokens:
                result[m] = result.get(m, 0.0) + weight / len(tokens)
        return {m: weight for m, weight in result.items() if weight > 0}


DEFAULT_MIX = TokenMix()


@dataclass(frozen=True)
class TableEntry:
    """For first_m <= m <= last_m (None: and beyond) this kernel runs."""

    first_m: int
    last_m: int | None
    candidate: Candidate


@dataclass(frozen=True)
class Choice:
    """The winner, every other kernel with its cost at decode and prefill, and the crossovers.

    On a CPU, `few_tokens`: up to this m the winner reads its weight as it is (int8 bytes, or 4-bit
    codes in the kernel's layout), beyond it brings the stored weight to bfloat16 first
    (`MANY_TOKENS`); 0 if the winner does the same at every m. On an Ascend target,
    `storage` is the stored weight, decided once; `table` says which kernel runs for which m, all
    of that storage; no entry is dearer than `1 + hysteresis` times the cheapest legal kernel for
    any m up to LARGEST_M; `weight_format` is the problem's; `storage_us` is the cost of the token
    mix for each storage allowed.
    """

    kernel: str
    precision: Precision
    few_tokens: int
    losers: tuple[tuple[str, str], ...]
    decode_us: float
    prefill_us: float
    storage: Storage = "float"
    table: tuple[TableEntry, ...] = ()
    hysteresis: float = 0.0
    storage_us: tuple[tuple[Storage, float], ...] = ()
    weight_format: WeightFormat = "ND"


def select_kernel(
    problem: MatmulProblem,
    target: Target,
    mix: TokenMix = DEFAULT_MIX,
    allow_float: bool = False,
    hysteresis: float = HYSTERESIS,
) -> Choice:
    """The kernels of least cost.

    CPU: over one prompt of 512 tokens and 256 decoding steps; mix, allow_float and hysteresis
    are for Ascend targets. There, the storage is the one of least cost over the mix (over the
    problem's m, if it fixes one), float storage only with `allow_float`; then a table over m.
    With `hysteresis=0` the table is the exact argmin for every m.

    Raises LoweringError, with every candidate's refusal, if none is legal.
    """
    if (problem.m is not None and problem.m < 1) or problem.n < 1 or problem.k < 1:
        raise LoweringError(
            f"a matmul of m={problem.m}, n={problem.n}, k={problem.k}: sizes start at 1"
        )
    if target.kind == "cpu":
        return _select_cpu(problem, target)
    return _select_ascend(problem, target, mix, allow_float, hysteresis)


# --- Ascend -------------------------------------------------------------------------------------


def _select_ascend(
    problem: MatmulProblem, target: Target, mix: TokenMix, allow_float: bool, hysteresis: float
) -> Choice:
    candidates = ascend_candidates(problem, target, allow_float)
    legal = [c for c in candidates if c.refusal is None]
    if not legal:
        raise _nothing_legal(problem, target, candidates)
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
    legal: Sequence[Candidate], problem: MatmulProblem, target: Target, weights: dict[int, float]
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
    same: Sequence[Candidate], problem: MatmulProblem, target: Target, hysteresis: float
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


def _nothing_legal(
    problem: MatmulProblem, target: Target, candidates: Sequence[Candidate]
) -> LoweringError:
    reasons = {f"{c.kernel}: {c.refusal}": None for c in candidates}
    return LoweringError(
        f"no kernel of target {target.name} can run {problem.scheme.name} for "
        f"n={problem.n}, k={problem.k}: {'; '.join(reasons)}",
        "choose another scheme for this matmul in the recipe",
    )


# --- CPU ----------------------------------------------------------------------------------------


def _select_cpu(problem: MatmulProblem, target: Target) -> Choice:
    candidates = cpu_candidates(problem)
    legal = [c for c in candidates if c.refusal is None]
    if not legal:
        raise _nothing_legal(problem, target, candidates)
    costs = {c.kernel: _costs(c, problem, target) for c in legal}
    few = {name: _few_tokens(name, problem, target) for name in costs}

    def preference(name: str) -> tuple[float, bool]:
        # An op that would never read its own layout gives way to the one that has none.
        idle = few[name] == 0 and MANY_TOKENS.get(name) in costs
        return DECODE_STEPS * costs[name][0] + costs[name][1], idle

    kernel = min(costs, key=preference)
    losers = [(c.kernel, c.refusal or _describe(costs[c.kernel])) for c in candidates]
    return Choice(
        kernel=kernel,
        precision=problem.precision,
        few_tokens=few[kernel],
        losers=tuple(entry for entry in losers if entry[0] != kernel),
        decode_us=costs[kernel][0],
        prefill_us=costs[kernel][1],
    )


def cpu_cost_name(kernel: str, few_tokens: int, m: int) -> str:
    """The name in `Target.kernels` of what this op of the CPU target does for m tokens."""
    return MANY_TOKENS.get(kernel, kernel) if m > few_tokens else kernel


def _few_tokens(kernel: str, problem: MatmulProblem, target: Target) -> int:
    many = MANY_TOKENS.get(kernel)
    return 0 if many is None else crossover_m(kernel, many, problem, target)


def _costs(candidate: Candidate, problem: MatmulProblem, target: Target) -> tuple[float, float]:
    names = [candidate.kernel]
    if candidate.kernel in MANY_TOKENS:
        names.append(MANY_TOKENS[candidate.kernel])

    def cheapest_us(m: int) -> float:
        expressions = [cost_us(name, problem, target) for name in names]
        return min(float(sympify(expression).subs(M, m)) for expression in expressions)

    return cheapest_us(DECODE_M), cheapest_us(PREFILL_M)


def _describe(costs: tuple[float, float]) -> str:
    return f"{costs[0]:.0f} us at m={DECODE_M}, {costs[1]:.0f} us at m={PREFILL_M}"
