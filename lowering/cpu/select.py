"""Choose a kernel of the CPU target: over one prompt of 512 tokens and 256 decoding steps."""

from __future__ import annotations

from sympy import sympify

from panguq.lowering.choice import DECODE_M, DECODE_STEPS, PREFILL_M, Choice
from panguq.lowering.cpu.candidates import cpu_candidates
from panguq.lowering.cpu.cost import MANY_TOKENS, M, cost_us, crossover_m, variants
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.target import Target


def select_cpu(problem: MatmulProblem, target: Target) -> Choice:
    """One kernel for every m, and up to how many tokens it reads its own layout of the weight.

    `problem.m` is None. Raises LoweringError, with every candidate's refusal, if none is legal.
    """
    candidates = cpu_candidates(problem)
    legal = target.legal(candidates, problem)
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


def _few_tokens(kernel: str, problem: MatmulProblem, target: Target) -> int:
    many = MANY_TOKENS.get(kernel)
    return 0 if many is None else crossover_m(kernel, many, problem, target)


def _costs(candidate: Candidate, problem: MatmulProblem, target: Target) -> tuple[float, float]:
    def cheapest_us(m: int) -> float:
        expressions = [cost_us(name, problem, target) for name in variants(candidate.kernel)]
        return min(float(sympify(expression).subs(M, m)) for expression in expressions)

    return cheapest_us(DECODE_M), cheapest_us(PREFILL_M)


def _describe(costs: tuple[float, float]) -> str:
    return f"{costs[0]:.0f} us at m={DECODE_M}, {costs[1]:.0f} us at m={PREFILL_M}"
