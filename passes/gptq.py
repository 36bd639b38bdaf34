"""GPTQ: choose a weight's codes column by column, each making up for the errors before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from panguq.passes.solve_weights import Solution, SolveWeights, WeightProblem
from panguq.passes.weight_scales import min_max_scale

panguq = torch.ops.panguq


@dataclass(frozen=True)
class Gptq(SolveWeights):
    """Placeholder until the column loop is written: round to nearest through the solving sweep."""

    name: ClassVar[str] = "gptq"

    def solve(self, problem: WeightProblem) -> Solution:
        """Round to nearest."""
        spec = problem.spec
        weight = problem.weight.to(problem.dtype)
        scale, zero = min_max_scale(weight, problem.group_size, spec)
        codes = panguq.quantize_weight(
            weight, scale, zero, problem.group_size, spec.quant_min, spec.quant_max
        )
        return Solution(codes, scale, zero)
