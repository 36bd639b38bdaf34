"""The shapes, dtypes and groups that CANN's quantized matmuls take.

Limits of sizes are the chip's; what else a generation after Atlas A2 takes is a rule of its own.

Sources: op-plugin's pages on npu_quant_matmul and npu_weight_quant_batchmatmul, and the pages of
ops-nn on aclnnQuantMatmulV5 and aclnnWeightQuantBatchMatmulV2.
"""

from __future__ import annotations

from panguq.ir.number_format import INT4, INT8, Integer
from panguq.ir.quant_spec import Scheme
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.limits import W4A8_GROUP
from panguq.lowering.problem import MatmulProblem

WORD_CODES = 8  # 4-bit codes in one int32
GROUP_UNIT = 32


def quant_matmul_refusal(problem: MatmulProblem, chip: Chip) -> str | None:
    """Why npu_quant_matmul cannot run W8A8, W4A8 or W4A4 on this shape; None if it can."""
    n, k, weight = problem.n, problem.k, problem.scheme.weight
    activation = problem.scheme.activation
    assert weight is not None and activation is not None
    if too_large := _too_large(n, k, chip):
        return too_large
    if problem.dtype == "float32":
        return "its result is float16 or bfloat16, the model is float32"
    if not weight.symmetric:
        return "it takes no zero points of weights"
    if weight.format == INT8:
        if activation.format != INT8:
            return f"{activation.bits}-bit inputs with 8-bit weights"
        return None if weight.granularity == "per_channel" else "8-bit weights must be per channel"
    if activation.format == INT8:
        return _w4a8_refusal(problem, chip)
    if weight.granularity != "per_channel":
        return "4-bit weights with 4-bit inputs must be per channel"
    for name, size in (("k", k), ("n", n)):
        if size % WORD_CODES:
            return f"{name}={size} is not a multiple of {WORD_CODES}: codes are stored 8 a word"
    if not activation.dynamic:
        return "4-bit inputs need a scale per token, found at run time"
    return None


def _w4a8_refusal(problem: MatmulProblem, chip: Chip) -> str | None:
    n, k, activation = problem.n, problem.k, problem.scheme.activation
    assert activation is not None
    if k % W4A8_GROUP:
        return f"k={k} is not a multiple of {W4A8_GROUP}, the group of 4-bit weights"
    if k >= chip.w4a8_smallest_refused_k:
        return f"k={k} is not below {chip.w4a8_smallest_refused_k}"
    if n % WORD_CODES:
        return f"n={n} is not a multiple of {WORD_CODES}: codes are stored 8 a word"
    # A scale per output is written as one per 256 inputs, repeated.
    weight = problem.scheme.weight
    assert weight is not None
    if weight.granularity == "per_group" and problem.group_size != W4A8_GROUP:
        return f"group size {problem.group_size}: with 8-bit inputs only {W4A8_GROUP}"
    if activation.granularity != "per_token" or not activation.dynamic:
        return "4-bit weights with 8-bit inputs need a scale per token, found at run time"
    return None


def weight_quant_refusal(problem: MatmulProblem, chip: Chip) -> str | None:
    """Why npu_weight_quant_batchmatmul cannot run W8A16 or W4A16 on this shape; None if it can."""
    n, k, weight = problem.n, problem.k, problem.scheme.weight
    assert weight is not None
    if too_large := _too_large(n, k, chip):
        return too_large
    if problem.dtype == "float32":
        return "its inputs are float16 or bfloat16, the model is float32"
    if weight.format == INT4 and n % WORD_CODES:
        return f"n={n} is not a multiple of {WORD_CODES}: codes are stored 8 a word"
    if weight.granularity == "per_group":
        group = problem.group_size
        if group % GROUP_UNIT:
            return f"group size {group} is not a multiple of {GROUP_UNIT}"
        if group > k - 1:
            return f"group size {group} is more than k - 1 = {k - 1}"
        if problem.weight_format == "NZ" and weight.format == INT4:
            if group not in (64, 128):
                return f"group size {group}: in NZ format only 64 and 128"
            if n % 64:
                return f"n={n} is not a multiple of 64, as NZ format with groups needs"
    return None


def _too_large(n: int, k: int, chip: Chip) -> str | None:
    for name, size in (("n", n), ("k", k)):
        if size > chip.largest_dimension:
            return f"{name}={size} is more than {chip.largest_dimension}"
    return None


# --- which of its own kernels CANN takes --------------------------------------------------------

Template = tuple[int, str]  # the largest m for which it is taken (0: no limit), and its name


def weight_quant_templates(problem: MatmulProblem, chip: Chip) -> list[Template]:
    """The kernels inside npu_weight_quant_batchmatmul, in the order in which CANN tries them.

    "msd" splits the input into 8-bit or 4-bit parts and multiplies integers; "nz_split_k"
    dequantizes and divides k; "dequantize" does not divide it. A second Split-K kernel is left
    out: it is for four white-listed shapes of grouped int8 weights, and panguq has no such scheme.
    Source: ops-nn, weight_quant_batch_matmul_v2, op_host/op_tiling.
    """
    n, k, weight = problem.n, problem.k, problem.scheme.weight
    assert weight is not None
    last = [(0, "dequantize")]
    if not chip.splits_inputs:
        return last
    if weight.granularity == "per_group":
        group = problem.group_size
        if weight.format != INT4 or group not in (64, 128) or k > 13952 or k % group or n % 64:
            return last
        return [(group // 8, "msd"), *last]
    if k % 32 or n % 32:
        return last
    largest = min(64, n // 2) if weight.format == INT4 else 64
    if problem.weight_format == "NZ" and not k % 64 and not n % 64:
        return [(largest, "msd"), (64, "dequantize"), (256, "nz_split_k"), *last]
    return [(largest, "msd"), *last]


# --- what takes a scheme's place ----------------------------------------------------------------

_FALLBACKS: dict[str, tuple[str, ...]] = {
    "W4A8": ("W8A8_DYNAMIC", "FLOAT"),
    "W4A4": ("W8A8_DYNAMIC", "FLOAT"),
    "W4A16": ("W8A16", "FLOAT"),
    "W4A16_ASYM": ("W8A16", "FLOAT"),
    "W4A8_STATIC": ("W4A8", "W8A8_DYNAMIC", "FLOAT"),
    "W6A6": ("W8A8_DYNAMIC", "FLOAT"),
    "W6A16": ("W8A16", "FLOAT"),
    "W3A16": ("W4A16", "W8A16", "FLOAT"),
    "W2A16": ("W4A16", "W8A16", "FLOAT"),
    "W1A16": (),  # its method knows only one width
    "W8A8": ("W8A8_DYNAMIC", "FLOAT"),  # experts alone take the second and not the first
    "W8A8_DYNAMIC": ("FLOAT",),
    "W8A16": ("FLOAT",),
    "FLOAT": (),
}


def fallback_names(scheme: Scheme) -> tuple[str, ...]:
    """Names of the schemes that take this one's place, in order, where no kernel takes a shape.

    A fallback keeps inputs that are quantized quantized (per token, which needs no calibration)
    and float inputs float, and goes to the next wider weights that a kernel reads, then to none.
    It is decided before weights are quantized, so that codes of the fallback exist. Codes that
    are no integers have none, since they are refused for what they are, and not for a shape.
    """
    if not all(isinstance(known, Integer) for known in scheme.formats):
        return ()  # who asked for FP8 wants neither integers nor floats instead
    base = scheme.name.partition("-")[0]
    return _FALLBACKS.get(base, ("FLOAT",))
