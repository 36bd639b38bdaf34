"""What the kernels of the CPU target are expected to cost: affine in m."""

from __future__ import annotations

import sympy

from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.target import Cost, KernelCost, Target

M = sympy.Symbol("m", positive=True)
BYTES, CONVERTED = "int8_weight_linear", "int8_weight_linear (converted)"
MANY_TOKENS = {BYTES: CONVERTED, "int4_linear": "dequantized_linear"}
"""What ops that take `few_tokens` cost beyond them, in `Target.kernels`."""


def cost_us(kernel: str, problem: MatmulProblem, target: Target) -> sympy.Expr:
    """Microseconds of one call on a CPU, an expression in m (a number if the problem fixes m)."""
    constants: KernelCost = target.kernels[kernel]
    weights = problem.n * problem.k
    weight_us = weights * constants.weight_bytes_per_weight / (constants.gb_per_s * 1e3)
    m = M if problem.m is None else problem.m
    return constants.launch_us + weight_us + m * weights / (constants.gmac_per_s * 1e3)


def crossover_m(first: str, second: str, problem: MatmulProblem, target: Target) -> int:
    """The largest m up to which `first` is at most as expensive as `second`; 0 if never."""
    difference = sympy.expand(cost_us(first, problem, target) - cost_us(second, problem, target))
    slope = difference.coeff(M, 1)
    if slope <= 0:
        return 2**31 - 1 if difference.subs(M, 1) <= 0 else 0
    return max(0, int(sympy.floor(-difference.coeff(M, 0) / slope)))


def cpu_cost_name(kernel: str, few_tokens: int, m: int) -> str:
    """The name in `Target.kernels` of what this op does for m tokens."""
    return MANY_TOKENS.get(kernel, kernel) if m > few_tokens else kernel


def variants(kernel: str) -> list[str]:
    """The names in `Target.kernels` of all that this op may do."""
    return [kernel, MANY_TOKENS[kernel]] if kernel in MANY_TOKENS else [kernel]


def cpu_cost(candidate: Candidate, problem: MatmulProblem, target: Target) -> Cost:
    """The cost of what the op does for the problem's m, which is a number."""
    found = [_cost(name, problem, target) for name in variants(candidate.kernel)]
    return min(found, key=lambda cost: cost.total_us)


def _cost(variant: str, problem: MatmulProblem, target: Target) -> Cost:
    total = float(cost_us(variant, problem, target))
    constants = target.kernels[variant]
    weights = problem.n * problem.k
    read = weights * constants.weight_bytes_per_weight / (constants.gb_per_s * 1e3)
    terms = {"launch": constants.launch_us, "weight_traffic": read}
    return Cost(total, {**terms, "multiply": total - constants.launch_us - read}, variant)
