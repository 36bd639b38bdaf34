"""The schemes and shapes of experts that npu_grouped_matmul takes.

Sources: op-plugin's page on npu_grouped_matmul, aclnnGroupedMatmulV5, and CANN's tiling of it.
"""

from __future__ import annotations

from panguq.ir.number_format import INT4, INT8
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.limits import CODES_PER_WORD, W4A8_GROUP
from panguq.kernels.ascend.vendor.grouped_matmul_rules import LARGEST_GROUPS, LARGEST_W4A8_K
from panguq.lowering.problem import MatmulProblem


def grouped_matmul_refusal(problem: MatmulProblem, chip: Chip) -> str | None:
    """Why npu_grouped_matmul cannot run the experts of this shape and scheme; None if it can."""
    n, k, weight = problem.n, problem.k, problem.scheme.weight
    activation = problem.scheme.activation
    assert weight is not None
    for name, size, most in (
        ("experts", problem.experts, LARGEST_GROUPS),
        ("n", n, chip.largest_dimension),
        ("k", k, chip.largest_dimension),
    ):
        if size > most:
            return f"{name}={size} is more than {most}"
    if problem.dtype == "float32":
        return "quantized experts are of float16 or bfloat16 models, the model is float32"
    if weight.format not in (INT4, INT8):
        return f"it reads no {weight.bits}-bit weights"
    if weight.format == INT4 and n % CODES_PER_WORD:
        return f"n={n} is not a multiple of {CODES_PER_WORD}: codes are stored 8 a word"
    if activation is None:
        return _weight_only_refusal(problem)
    if not weight.symmetric:
        return "with quantized inputs it takes no zero points of weights"
    if activation.format != INT8:
        return f"panguq calls it with 8-bit or float inputs, not {activation.bits}-bit ones"
    if activation.granularity != "per_token" or not activation.dynamic:
        return "a scale for all tokens needs a zero point, which its bfloat16 bias cannot hold"
    if weight.format == INT4:
        return _w4a8_refusal(problem)
    if weight.granularity != "per_channel":
        return "8-bit weights must be per channel"
    if problem.biased and problem.dtype == "float16":
        return "a float16 result takes no float bias"
    return None


def _weight_only_refusal(problem: MatmulProblem) -> str | None:
    weight = problem.scheme.weight
    assert weight is not None
    if weight.granularity == "per_channel":
        return None
    if weight.format == INT8:
        return "8-bit weights must be per channel"
    if not weight.symmetric:
        return "zero points of groups are not taken, those of outputs are"
    if problem.group_size % 2:
        return f"group size {problem.group_size} is odd"
    return None


def _w4a8_refusal(problem: MatmulProblem) -> str | None:
    weight = problem.scheme.weight
    assert weight is not None
    if problem.k % 64 or problem.k > LARGEST_W4A8_K:
        return f"k={problem.k} is not a multiple of 64 up to {LARGEST_W4A8_K}"
    if weight.granularity == "per_group" and problem.group_size != W4A8_GROUP:
        return f"group size {problem.group_size}: with 8-bit inputs only {W4A8_GROUP}"
    if problem.biased:
        return "its bias holds what the split of its inputs takes off, and no other"
    if problem.experts == 1:
        return "it reads counts of experts, which may not be of one"
    return None
