"""Choose how a matmul's weight lies in memory, together with its kernels."""

from __future__ import annotations

from dataclasses import replace

from panguq.lowering.choice import DEFAULT_MIX, Choice, TokenMix
from panguq.lowering.problem import FormatOption, MatmulProblem
from panguq.lowering.select_kernel import select_kernel
from panguq.lowering.target import Target


def select_format(
    problem: MatmulProblem,
    target: Target,
    option: FormatOption = "auto",
    mix: TokenMix = DEFAULT_MIX,
    allow_float: bool = False,
) -> Choice:
    """The kernels of least cost over the mix, in the weight format that `option` allows.

    Raises LoweringError if no kernel is legal.
    """
    choices = [
        select_kernel(replace(problem, weight_format=format), target, mix, allow_float)
        for format in target.weight_formats(problem, option)
    ]
    return min(choices, key=lambda choice: choice.mix_us)
