"""Which kernels of an NPU may do a matmul, and why the others may not. Nothing of speed."""

from __future__ import annotations

from panguq.ir.number_format import INT4, INT8
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.own import w4a16, w8a8
from panguq.kernels.ascend.own.tiles import legal_tiles
from panguq.lowering.ascend.expert_rules import grouped_matmul_refusal
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.rules import quant_matmul_refusal, weight_quant_refusal
from panguq.lowering.problem import (
    FLOAT_OP,
    MIXED_WIDTHS,
    Candidate,
    KernelSchedule,
    MatmulProblem,
    Storage,
    Tile,
)


def ascend_candidates(
    problem: MatmulProblem, target: AscendMachine, allow_float: bool = False
) -> list[Candidate]:
    """The vendor's op first, panguq's own kernels for every tile and number of splits, and the
    float matmul, which is legal for a quantized scheme only with `allow_float`."""
    weight, activation = problem.scheme.weight, problem.scheme.activation
    if weight is None:
        return [Candidate(FLOAT_OP)]
    if (refusal := _format_refusal(problem, target.chip)) is not None:
        return [Candidate("none", refusal)]
    try:
        _ = problem.group_size
    except ValueError as error:
        found = [Candidate("none", str(error))]
    else:
        if problem.mixed:
            found = [Candidate("none", MIXED_WIDTHS)]
        elif problem.experts:
            return [_grouped(problem, target)]
        elif weight.format not in (INT4, INT8):
            found = [Candidate("none", f"no NPU kernel reads {weight.bits}-bit weights")]
        elif activation is not None:
            storage: Storage = "int8" if weight.format == INT8 else "int4"
            found = [
                Candidate(
                    "npu_quant_matmul", quant_matmul_refusal(problem, target.chip), storage=storage
                )
            ]
            if weight.format == activation.format == INT8:
                found += _own(problem, target, "w8a8", storage)
        else:
            storage = "int8" if weight.format == INT8 else "int4"
            refusal = weight_quant_refusal(problem, target.chip)
            found = [Candidate("npu_weight_quant_batchmatmul", refusal, storage=storage)]
            if weight.format == INT4:
                found += _own(problem, target, "w4a16", "int4_quarters")
    off = f"the scheme is {problem.scheme.name}, and allow_float is off"
    return [*found, Candidate(FLOAT_OP, None if allow_float else off)]


def _format_refusal(problem: MatmulProblem, chip: Chip) -> str | None:
    """Why no kernel of the chip reads the scheme's formats; None if some may."""
    if problem.foreign is not None:
        if not chip.foreign_formats:
            return problem.foreign
        known = ", ".join(chip.foreign_formats)
        return f"{problem.foreign}; {chip.name} multiplies {known}, panguq has no kernel of them"
    return chip.int4_refusal if INT4 in problem.scheme.formats else None


def _grouped(problem: MatmulProblem, target: AscendMachine) -> Candidate:
    """The one op that multiplies with many weights; there is none of panguq's own."""
    weight = problem.scheme.weight
    storage: Storage = "int8" if weight is not None and weight.format == INT8 else "int4"
    refusal = grouped_matmul_refusal(problem, target.chip)
    return Candidate("npu_grouped_matmul", refusal, storage=storage)


def split_counts(cores: int) -> list[int]:
    """Numbers of splits worth a try: powers of two, and what divides the cores evenly."""
    divisors = {s for s in range(2, cores + 1) if cores % s == 0}
    powers = {2**e for e in range(1, 8) if 2**e <= cores}
    return sorted(divisors | powers)


def _own(
    problem: MatmulProblem, target: AscendMachine, family: str, storage: Storage
) -> list[Candidate]:
    unfit = _own_refusal(problem)
    found = []
    for count in [1, *split_counts(int(target["cube_cores"]))]:
        schedule: KernelSchedule = "split_k" if count > 1 else "data_parallel"
        kernel = f"{family}_{schedule}"
        for tile in legal_tiles(kernel, target.chip):
            refusal = unfit or _kernel_refusal(problem, target.chip, family, count, tile)
            found.append(Candidate(kernel, refusal, schedule, count, tile, storage))
    return found


def _kernel_refusal(
    problem: MatmulProblem, chip: Chip, family: str, splits: int, tile: Tile
) -> str | None:
    m, n, k = problem.m, problem.n, problem.k
    if family == "w8a8":
        return w8a8.refusal(m, n, k, splits, tile, chip)
    weight = problem.scheme.weight
    grouped = weight is not None and weight.granularity == "per_group"
    group_size = problem.group_size if grouped else 0
    return w4a16.refusal(m, n, k, group_size, splits, tile, chip)


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
