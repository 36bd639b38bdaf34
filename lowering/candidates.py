"""Which kernels may do a matmul, and why the others may not. Nothing here is about speed."""

from __future__ import annotations

from panguq.ir.number_format import INT4, INT8
from panguq.ir.quant_spec import SCHEMES, Scheme
from panguq.kernels.ascend.own import w4a16, w8a8
from panguq.kernels.ascend.own.tiles import legal_tiles
from panguq.kernels.cpu import int4_linear, int8_linear, int8_weight_linear
from panguq.lowering.ascend.rules import (
    fallback_names,
    quant_matmul_refusal,
    weight_quant_refusal,
)
from panguq.lowering.problem import (
    Candidate,
    Dtype,
    KernelSchedule,
    MatmulProblem,
    Precision,
    Storage,
    Tile,
    WeightFormat,
)
from panguq.lowering.target import Target

__all__ = [
    "Candidate",
    "Dtype",
    "KernelSchedule",
    "MatmulProblem",
    "Precision",
    "Storage",
    "Tile",
    "WeightFormat",
    "ascend_candidates",
    "candidates",
    "cpu_candidates",
    "fallbacks",
    "scheme_refusal",
]

FLOAT_OP = "linear"
_MIXED = "the weight's groups have several widths"


def candidates(
    problem: MatmulProblem, target: Target, allow_float: bool = False
) -> list[Candidate]:
    """All kernels of the target that know the scheme, legal or not."""
    if target.kind == "cpu":
        return cpu_candidates(problem)
    return ascend_candidates(problem, target, allow_float)


def scheme_refusal(problem: MatmulProblem, target: Target) -> str | None:
    """Why the target cannot run the problem's scheme on its shape; None if some kernel can."""
    found = candidates(problem, target)
    if any(c.refusal is None for c in found):
        return None
    reasons = {f"{c.kernel}: {c.refusal}": None for c in found if c.storage != "float"}
    return "; ".join(reasons or {f"{c.kernel}: {c.refusal}": None for c in found})


def fallbacks(scheme: Scheme) -> tuple[Scheme, ...]:
    """The schemes that take this one's place, in order, where no kernel takes a shape.

    See `ascend.rules.fallback_names` for the order and its reasons.
    """
    return tuple(SCHEMES[name] for name in fallback_names(scheme))


def ascend_candidates(
    problem: MatmulProblem, target: Target, allow_float: bool = False
) -> list[Candidate]:
    """The vendor's op first, panguq's own kernels for every tile and number of splits, and the
    float matmul, which is legal for a quantized scheme only with `allow_float`."""
    weight, activation = problem.scheme.weight, problem.scheme.activation
    if weight is None:
        return [Candidate(FLOAT_OP)]
    try:
        _ = problem.group_size
    except ValueError as error:
        found = [Candidate("none", str(error))]
    else:
        if problem.mixed:
            found = [Candidate("none", _MIXED)]
        elif weight.format not in (INT4, INT8):
            found = [Candidate("none", f"no NPU kernel reads {weight.bits}-bit weights")]
        elif activation is not None:
            storage: Storage = "int8" if weight.format == INT8 else "int4"
            found = [Candidate("npu_quant_matmul", quant_matmul_refusal(problem), storage=storage)]
            if weight.format == activation.format == INT8:
                found += _own(problem, target, "w8a8", storage)
        else:
            storage = "int8" if weight.format == INT8 else "int4"
            refusal = weight_quant_refusal(problem)
            found = [Candidate("npu_weight_quant_batchmatmul", refusal, storage=storage)]
            if weight.format == INT4:
                found += _own(problem, target, "w4a16", storage)
    off = f"the scheme is {problem.scheme.name}, and allow_float is off"
    return [*found, Candidate(FLOAT_OP, None if allow_float else off)]


def split_counts(cores: int) -> list[int]:
    """Numbers of splits worth a try: powers of two, and what divides the cores evenly."""
    divisors = {s for s in range(2, cores + 1) if cores % s == 0}
    powers = {2**e for e in range(1, 8) if 2**e <= cores}
    return sorted(divisors | powers)


def _own(problem: MatmulProblem, target: Target, family: str, storage: Storage) -> list[Candidate]:
    unfit = _own_refusal(problem)
    found = []
    for count in [1, *split_counts(int(target["cube_cores"]))]:
        schedule: KernelSchedule = "split_k" if count > 1 else "data_parallel"
        kernel = f"{family}_{schedule}"
        for tile in legal_tiles(kernel):
            refusal = unfit or _kernel_refusal(problem, family, count, tile)
            found.append(Candidate(kernel, refusal, schedule, count, tile, storage))
    return found


def _kernel_refusal(problem: MatmulProblem, family: str, splits: int, tile: Tile) -> str | None:
    m, n, k = problem.m, problem.n, problem.k
    if family == "w8a8":
        return w8a8.refusal(m, n, k, splits, tile)
    weight = problem.scheme.weight
    grouped = weight is not None and weight.granularity == "per_group"
    return w4a16.refusal(m, n, k, problem.group_size if grouped else 0, splits, tile)


def _own_refusal(problem: MatmulProblem) -> str | None:
    weight, activation = problem.scheme.weight, problem.scheme.activation
    assert weight is not None
    if not problem.own_kernels:
        return "the recipe wants the vendor's kernels alone"
    if problem.dtype == "float32":
        return "its result is float16 or bfloat16, the model is float32"
    if problem.weight_format != "ND":
        return "it reads weights in ND format"
    if activation is None:
        return None
    if weight.granularity != "per_channel" or not weight.symmetric:
        return "8-bit weights must be symmetric, with one scale per output"
    if problem.dtype == "float16" and activation.granularity == "per_tensor":
        return (
            "a float16 model's scales are stored as 19-bit floats (npu_trans_quant_param), "
            "which it does not read"
        )
    return None


def cpu_candidates(problem: MatmulProblem) -> list[Candidate]:
    """All kernels of the CPU target that know the scheme, legal or not."""
    m, n, k = problem.m, problem.n, problem.k
    weight, activation = problem.scheme.weight, problem.scheme.activation
    if weight is None:
        return [Candidate("linear")]
    if weight.format == INT8 and activation is not None:
        grouped = None if weight.granularity == "per_channel" else "weights must be per channel"
        return [Candidate("int8_linear", grouped or int8_linear.refusal(m, n, k))]
    if activation is not None:
        return [Candidate("dequantized_linear")]  # of the dequantized activations
    rounds = "it multiplies in bfloat16, the recipe asks for float32"
    rounded = rounds if problem.precision == "float32" else _MIXED if problem.mixed else None
    fallback = Candidate("dequantized_linear")
    if weight.format == INT8:
        grouped = None if weight.granularity == "per_channel" else "weights must be per channel"
        refusal = rounded or grouped or int8_weight_linear.refusal(m, n, k)
        return [Candidate("int8_weight_linear", refusal), fallback]
    if weight.format == INT4:
        refusal = rounded or int4_linear.refusal(m, n, k, problem.group_size)
        return [Candidate("int4_linear", refusal), fallback]
    return [fallback]
