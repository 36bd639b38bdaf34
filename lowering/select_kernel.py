"""Choose kernels for a matmul: the cheapest legal ones, keeping the losers and their cost."""

from __future__ import annotations

from panguq.errors import LoweringError
from panguq.lowering.choice import DEFAULT_MIX, HYSTERESIS, Choice, TokenMix
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.target import Target


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
    return target.select(problem, mix, allow_float, hysteresis)


def scheme_refusal(problem: MatmulProblem, target: Target) -> str | None:
    """Why the target cannot run the problem's scheme on its shape; None if some kernel can."""
    found = target.candidates(problem)
    if any(c.refusal is None for c in found):
        return None
    reasons = {f"{c.kernel}: {c.refusal}": None for c in found if c.storage != "float"}
    return "; ".join(reasons or {f"{c.kernel}: {c.refusal}": None for c in found})
