"""Choose how a matmul's weight lies in an NPU's memory, together with its kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from panguq.ir.number_format import INT8
from panguq.lowering.problem import MatmulProblem, WeightFormat
from panguq.lowering.select_kernel import DEFAULT_MIX, Choice, TokenMix, select_kernel
from panguq.lowering.target import Target

FormatOption = Literal["auto", "ND", "NZ"]


def select_format(
    problem: MatmulProblem,
    target: Target,
    option: FormatOption = "auto",
    mix: TokenMix = DEFAULT_MIX,
    allow_float: bool = False,
) -> Choice:
    """The kernels of least cost over the mix, in the weight format that `option` allows.

    Formats are compared for int8 weights of integer matmuls on an NPU; other weights are ND: the
    vendor documents NZ for weight-only matmuls in graph mode alone. Raises LoweringError if no
    kernel is legal.
    """
    weight, activation = problem.scheme.weight, problem.scheme.activation
    fractal = weight is not None and weight.format == INT8 and activation is not None
    formats: tuple[WeightFormat, ...] = ("ND",)
    if target.kind == "ascend" and fractal and option != "ND":
        formats = ("NZ",) if option == "NZ" else ("ND", "NZ")
    choices = [
        select_kernel(replace(problem, weight_format=f), target, mix, allow_float) for f in formats
    ]
    return min(choices, key=lambda choice: dict(choice.storage_us).get(choice.storage, 0.0))
