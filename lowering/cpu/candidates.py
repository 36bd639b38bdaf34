"""Which kernels of the CPU target may do a matmul, and why the others may not."""

from __future__ import annotations

from panguq.ir.number_format import INT4, INT8
from panguq.kernels.cpu import int4_linear, int8_linear, int8_weight_linear
from panguq.lowering.problem import FLOAT_OP, MIXED_WIDTHS, Candidate, MatmulProblem


def cpu_candidates(problem: MatmulProblem) -> list[Candidate]:
    """All kernels of the CPU target that know the scheme, legal or not."""
    m, n, k = problem.m, problem.n, problem.k
    weight, activation = problem.scheme.weight, problem.scheme.activation
    if weight is None:
        return [Candidate(FLOAT_OP)]
    if problem.foreign is not None:
        return [Candidate("none", problem.foreign)]
    if weight.format == INT8 and activation is not None:
        grouped = None if weight.granularity == "per_channel" else "weights must be per channel"
        return [Candidate("int8_linear", grouped or int8_linear.refusal(m, n, k))]
    if activation is not None:
        return [Candidate("dequantized_linear")]  # of the dequantized activations
    rounds = "it multiplies in bfloat16, the recipe asks for float32"
    rounded = rounds if problem.precision == "float32" else MIXED_WIDTHS if problem.mixed else None
    fallback = Candidate("dequantized_linear")
    if weight.format == INT8:
        grouped = None if weight.granularity == "per_channel" else "weights must be per channel"
        refusal = rounded or grouped or int8_weight_linear.refusal(m, n, k)
        return [Candidate("int8_weight_linear", refusal), fallback]
    if weight.format == INT4:
        refusal = rounded or int4_linear.refusal(m, n, k, problem.group_size)
        return [Candidate("int4_linear", refusal), fallback]
    return [fallback]
