"""What a kernel is expected to cost. A wrong cost makes a slow choice, never a wrong result."""

from __future__ import annotations

import sympy

from panguq.lowering.candidates import MatmulProblem
from panguq.lowering.targets import KernelCost, Target

M = sympy.Symbol("m", positive=True)


def cost_us(kernel: str, problem: MatmulProblem, target: Target) -> sympy.Expr:
    """Microseconds of one call, an expression in m (a number if the problem fixes m)."""
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
