"""Choose a kernel for a matmul: the cheapest legal one, keeping the losers and their cost."""

from __future__ import annotations

from dataclasses import dataclass

from panguq.errors import LoweringError
from panguq.lowering.candidates import Candidate, MatmulProblem, Precision, cpu_candidates
from panguq.lowering.cost_model import M, cost_us, crossover_m
from panguq.lowering.targets import Target

DECODE_M, PREFILL_M = 1, 512
# What a served request is made of: one prompt, then this many tokens one by one.
DECODE_STEPS = 256
BYTES, CONVERTED = "int8_weight_linear", "int8_weight_linear (converted)"


@dataclass(frozen=True)
class Choice:
    """The winner, every candidate with its cost at decode and prefill, and the crossover.

    `few_tokens`: up to this m the winner reads its weight as it is stored, beyond it converts the
    weight first (only `int8_weight_linear` can do both).
    """

    kernel: str
    precision: Precision
    few_tokens: int
    losers: tuple[tuple[str, str], ...]
    decode_us: float
    prefill_us: float


def select_kernel(problem: MatmulProblem, target: Target) -> Choice:
    """The kernel of least cost over one prompt of 512 tokens and 256 decoding steps.

    Raises LoweringError, with every candidate's refusal, if none is legal.
    """
    candidates = cpu_candidates(problem)
    legal = [c for c in candidates if c.refusal is None]
    if not legal:
        reasons = "; ".join(f"{c.kernel}: {c.refusal}" for c in candidates)
        raise LoweringError(
            f"no kernel of target {target.name} can run {problem.scheme.name} for "
            f"n={problem.n}, k={problem.k}: {reasons}",
            "choose another scheme for this matmul in the recipe",
        )
    costs = {c.kernel: _costs(c, problem, target) for c in legal}
    kernel = min(costs, key=lambda name: DECODE_STEPS * costs[name][0] + costs[name][1])
    few_tokens = 0
    if kernel == BYTES:
        few_tokens = crossover_m(BYTES, CONVERTED, problem, target)
    losers = [(c.kernel, c.refusal or _describe(costs[c.kernel])) for c in candidates]
    return Choice(
        kernel=kernel,
        precision=problem.precision,
        few_tokens=few_tokens,
        losers=tuple(entry for entry in losers if entry[0] != kernel),
        decode_us=costs[kernel][0],
        prefill_us=costs[kernel][1],
    )


def _costs(candidate: Candidate, problem: MatmulProblem, target: Target) -> tuple[float, float]:
    variants = [candidate.kernel]
    if candidate.kernel == BYTES:
        variants.append(CONVERTED)

    def cheapest_us(m: int) -> float:
        expressions = [cost_us(variant, problem, target) for variant in variants]
        return min(float(expression.subs(M, m)) for expression in expressions)

    return cheapest_us(DECODE_M), cheapest_us(PREFILL_M)


def _describe(costs: tuple[float, float]) -> str:
    return f"{costs[0]:.0f} us at m={DECODE_M}, {costs[1]:.0f} us at m={PREFILL_M}"
