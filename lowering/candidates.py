"""Which kernels may do a matmul, and why the others may not. Nothing here is about speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from panguq.ir.quant_spec import Scheme
from panguq.kernels.cpu import int4_linear, int8_linear, int8_weight_linear

Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class MatmulProblem:
    """`[m, k] x [n, k]^T` under a scheme; m is None where it varies at run time.

    `precision` is the least that weight-only matmuls of a float32 model may multiply in.
    """

    m: int | None
    n: int
    k: int
    scheme: Scheme
    precision: Precision = "bfloat16"

    @property
    def group_size(self) -> int:
        """Inputs per weight scale; k where there are no groups."""
        return self.scheme.weight.group_size_for(self.k) if self.scheme.weight else self.k


@dataclass(frozen=True)
class Candidate:
    """A kernel for a problem; `refusal` says why it is not legal, None if it is."""

    kernel: str
    refusal: str | None = None


def cpu_candidates(problem: MatmulProblem) -> list[Candidate]:
    """All kernels of the CPU target that know the scheme, legal or not."""
    m, n, k = problem.m, problem.n, problem.k
    weight, activation = problem.scheme.weight, problem.scheme.activation
    if weight is None:
        return [Candidate("linear")]
    if weight.bits == 8 and activation is not None:
        grouped = None if weight.granularity == "per_channel" else "weights must be per channel"
        return [Candidate("int8_linear", grouped or int8_linear.refusal(m, n, k))]
    if activation is not None:
        return [Candidate("none", f"no kernel of target cpu runs {problem.scheme.name}")]
    rounds = "it multiplies in bfloat16, the recipe asks for float32"
    rounded = rounds if problem.precision == "float32" else None
    fallback = Candidate("dequantized_linear")
    if weight.bits == 8:
        grouped = None if weight.granularity == "per_channel" else "weights must be per channel"
        refusal = rounded or grouped or int8_weight_linear.refusal(m, n, k)
        return [Candidate("int8_weight_linear", refusal), fallback]
    if weight.bits == 4:
        refusal = rounded or int4_linear.refusal(m, n, k, problem.group_size)
        return [Candidate("int4_linear", refusal), fallback]
    return [Candidate("none", f"no kernel of target cpu runs {problem.scheme.name}")]
