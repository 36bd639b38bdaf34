"""How a candidate runs on an Ascend NPU: the formulas and numbers that its cost follows from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from panguq.ir.number_format import INT4, INT8
from panguq.kernels.ascend.chip import Chip
from panguq.lowering.ascend.cost.terms import ARGUMENTS, Adding, Form, WeightLayout
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.rules import weight_quant_templates
from panguq.lowering.problem import FLOAT_BYTES, Candidate, MatmulProblem, Tile

_W4A8_SCALE_BYTES, _FLOAT32 = 8, 4
_UNTIMED = {
    "load_start_us": 0.0,
    "exposed": 0.0,
    "scaling_cycles": 0.0,
    "cube_times": 1.0,
    "sum_bytes": 0.0,
}
# Counted in what AscendNPU IR's compiler makes of the W4A16 kernel (conformance/triton/hivm.py), in
# vectors of 128 16-bit numbers: to turn a vector of codes into numbers, and to scale and add one of
# float32 sums, which is two of them.
_UNPACK = {"float16": 2.5, "bfloat16": 5.5}
_SCALE_SUMS = 2 * 2


@dataclass(frozen=True)
class Execution:
    """One way to run a matmul: `numbers` are values of `terms.ARGUMENTS`, without m, n, k and
    the target's constants. It is taken for first_m <= m <= last_m (None: no limit)."""

    form: Form
    numbers: dict[str, float] = field(hash=False)
    label: str
    first_m: int = 1
    last_m: int | None = None

    def argument(self, name: str, problem: MatmulProblem, target: AscendMachine) -> float:
        """The value of one of `terms.ARGUMENTS` other than m."""
        if name in self.numbers:
            return self.numbers[name]
        return getattr(problem, name) if name in ("n", "k") else target[name]

    def arguments(self, problem: MatmulProblem, target: AscendMachine) -> list[float]:
        """The values of all `terms.ARGUMENTS` but m, which is the first."""
        return [self.argument(name, problem, target) for name in ARGUMENTS[1:]]


def executions(
    candidate: Candidate, problem: MatmulProblem, target: AscendMachine
) -> list[Execution]:
    """The ways to run a candidate. Of several, the cheapest counts: CANN tunes its tilings."""
    if candidate.schedule != "vendor":
        return [own_execution(candidate, problem, target)]
    first, found = 1, []
    for last, template in _templates(candidate, problem, target.chip):
        if last and last < first:
            continue
        if template == "nz_split_k":
            found.append(_nz_split_k(problem, target, first, last))
            first = last + 1
            continue
        form, numbers = _vendor_form(template, problem, target)
        found += [
            Execution(form, numbers | blocks, f"{template}, {label}", first, last or None)
            for label, blocks in _grids(target, numbers["x_bytes"])
        ]
        first = last + 1
    return found


def own_execution(
    candidate: Candidate,
    problem: MatmulProblem,
    target: AscendMachine,
    dequantize: Literal["ring", "workspace"] = "ring",
    tile_vector_cores: int | None = None,
    all_add: bool = False,
) -> Execution:
    """A kernel with tiles of its own. In panguq's, both vector cores of a pair unpack a tile of a
    4-bit weight; with Split-K, one does, and adds the partial sums of the tile that it finishes.

    `dequantize`, `tile_vector_cores` and `all_add` describe other people's kernels, to compare.
    """
    assert candidate.tile is not None
    split = candidate.schedule == "split_k"
    adding: Adding = "no one" if not split else "all cores" if all_add else "last program"
    form = Form("tiles", "kn", mixed=True, adding=adding)
    if problem.scheme.activation is None:
        form = replace(form, dequantize=dequantize)
        numbers = _weight_only(problem, target)
        if dequantize == "ring":
            numbers |= _scaled_sums(problem, candidate.tile)
    else:
        # no better at hiding memory than CANN's kernel
        numbers = _int8(problem, target) | {"exposed": target["int8_exposed"]}
    cores = tile_vector_cores or (1 if split else 2)
    numbers |= {"splits": candidate.splits}
    numbers |= dict(zip(("block_m", "block_n", "block_k"), candidate.tile, strict=True))
    numbers |= {"grid_m": 1, "grid_n": 1, "tile_vector_cores": cores}
    return Execution(form, numbers, str(candidate))


def scheme_numbers(problem: MatmulProblem, target: AscendMachine) -> dict[str, float]:
    """The numbers of a scheme whose stored weights the cube multiplies as they are."""
    weight, activation = problem.scheme.weight, problem.scheme.activation
    if weight is None:
        return _float(problem, target)
    assert activation is not None
    if weight.format == INT8:
        return _int8(problem, target)
    if activation.format == INT8:  # 8-bit inputs as two 4-bit halves
        return _int4(problem, target, 2, _W4A8_SCALE_BYTES / 256)
    return _int4(problem, target, 1, _FLOAT32 / problem.k)


def _templates(candidate: Candidate, problem: MatmulProblem, chip: Chip) -> list[tuple[int, str]]:
    if candidate.kernel == "npu_weight_quant_batchmatmul":
        return weight_quant_templates(problem, chip)
    if candidate.kernel == "npu_quant_matmul":
        weight, activation = problem.scheme.weight, problem.scheme.activation
        assert weight is not None and activation is not None
        return [(0, f"w{weight.bits}a{activation.bits}")]
    return [(0, "float")]


def _vendor_form(
    template: str, problem: MatmulProblem, target: AscendMachine
) -> tuple[Form, dict[str, float]]:
    if template == "float":
        form = Form("rectangles", "nk", mixed=False, timed=problem.dtype != "float32")
        return form, _float(problem, target) | _timed(problem, target, "float")
    layout: WeightLayout = "blocked" if problem.weight_format == "NZ" else "kn"
    form = Form("rectangles", layout, mixed=True)
    weight = problem.scheme.weight
    assert weight is not None
    timed = weight.format == INT8 and weight.granularity == "per_channel"
    plain = Form("rectangles", layout, mixed=False, timed=True)
    if problem.scheme.activation is not None:
        numbers = scheme_numbers(problem, target)
        return (plain, numbers | _timed(problem, target, "int8")) if timed else (form, numbers)
    numbers = _weight_only(problem, target)
    if template == "msd":
        if weight.format == INT4:
            return form, _int4(problem, target, 3, numbers["scale_bytes"])
        parts = {"x_parts": 2, "scale_bytes": numbers["scale_bytes"]}
        sums = {"scaling_cycles": target["w8a16_sum_cycles"]}
        return plain, _int8(problem, target) | parts | _timed(problem, target, "w8a16") | sums
    if timed:
        vendor = replace(plain, dequantize="vendor")
        return vendor, numbers | _timed(problem, target, "w8a16")
    return replace(form, dequantize="vendor"), numbers


def _timed(problem: MatmulProblem, target: AscendMachine, kind: str) -> dict[str, float]:
    """The numbers of CANN's own kernel. Results that are bfloat16, or scaled by token, are scaled
    on the vector cores; others on the way out of the cube."""
    activation = problem.scheme.activation
    per_token = activation is not None and activation.granularity == "per_token"
    scaled = activation is not None and (per_token or problem.dtype == "bfloat16")
    row_bytes = 2 if activation is None else 1
    aligned = problem.k * row_bytes % 32 == 0 and problem.n * row_bytes % 32 == 0
    found = {
        "launch_us": target[f"{kind}_start_us"],
        "load_start_us": 0.0 if kind == "float" else target[f"{kind}_load_start_us"],
        "exposed": target["float_exposed" if kind == "float" else "int8_exposed"],
        "scaling_cycles": target["epilogue_cycles"] if scaled else 0.0,
        "cube_times": 1.0 if aligned else target["unaligned_cube"],
        "memory_gb_per_s": target[f"{kind}_memory_gb_per_s"],
    }
    if kind == "int8":
        found["core_load_bytes_per_cycle"] = target["int8_load_bytes_per_cycle"]
    if kind == "w8a16":
        slower = target["w8a16_bfloat16_times"] if problem.dtype == "bfloat16" else 1.0
        rate = target["w8a16_dequantize_bytes_per_cycle"] / slower
        found["vendor_dequantize_bytes_per_cycle"] = rate
    return found


def _nz_split_k(
    problem: MatmulProblem, target: AscendMachine, first_m: int, last_m: int
) -> Execution:
    """CANN's own Split-K for NZ weights: blocks of 128 x 128, at least 1024 of k for each part.

    Source: ops-nn, weight_quant_batch_matmul_v2, custom_nz_splitk tiling.
    """
    splits = min(-(-problem.k // 1024), int(target["cube_cores"]))
    form = Form("tiles", "blocked", mixed=True, adding="all cores", dequantize="ring")
    blocks = {"block_m": 128, "block_n": 128, "block_k": 512, "splits": splits}
    grid = {"grid_m": 1, "grid_n": 1, "tile_vector_cores": 2}
    numbers = _weight_only(problem, target) | blocks | grid
    return Execution(form, numbers, f"nz_split_k, {splits} splits", first_m, last_m)


def _grids(target: AscendMachine, x_bytes: float) -> list[tuple[str, dict[str, float]]]:
    """Ways to cut the result into one rectangle a core, on all cores, a half, a third … of them
    (fewer cores start sooner), times every block size."""
    cores = int(target["cube_cores"])
    block_k = max(16, int(target["memory_unit_bytes"] / x_bytes))
    pairs: dict[tuple[int, int], None] = {}
    for used in [cores // share for share in range(1, cores + 1) if cores % share == 0]:
        for grid_m in range(1, used + 1):
            grid_n = used // grid_m
            pairs[used // grid_n, grid_n] = None  # with so many columns, so many rows fit
    found: list[tuple[str, dict[str, float]]] = []
    for (grid_m, grid_n), (block_m, block_n) in product(pairs, target.chip.vendor_blocks):
        label = f"{grid_m}x{grid_n} cores, blocks {block_m}x{block_n}"
        blocks = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
        grid = {"grid_m": grid_m, "grid_n": grid_n, "splits": 1}
        found.append((label, {**blocks, **grid, "tile_vector_cores": 2}))
    return found


def _float(problem: MatmulProblem, target: AscendMachine) -> dict[str, float]:
    size = FLOAT_BYTES[problem.dtype]
    chip = target.chip
    fractal_k = chip.fractal_k.get(size, target["float32_macs_per_cycle"] / chip.fractal**2)
    memory = target["float_memory_gb_per_s"]
    return _scheme((1, size, size, size, 0), size, fractal_k, memory)


def _int8(problem: MatmulProblem, target: AscendMachine) -> dict[str, float]:
    bytes_ = (1, 1, 1, 1, _FLOAT32 / problem.k)
    return _scheme(bytes_, 2, target.chip.fractal_k[1.0], target["int8_memory_gb_per_s"])


def _int4(
    problem: MatmulProblem, target: AscendMachine, x_parts: int, scale_bytes: float
) -> dict[str, float]:
    bytes_ = (x_parts, 0.5, 0.5, 0.5, scale_bytes)
    return _scheme(bytes_, 2, target.chip.fractal_k[0.5], target["hbm_gb_per_s"])


def _weight_only(problem: MatmulProblem, target: AscendMachine) -> dict[str, float]:
    """Weights that become 16-bit before the cube multiplies."""
    weight = problem.scheme.weight
    assert weight is not None
    per_group = FLOAT_BYTES[problem.dtype] * (1 if weight.symmetric else 2)
    bytes_ = (1, 2, weight.bits / 8, 2, per_group / problem.group_size)
    return _scheme(bytes_, 2, target.chip.fractal_k[2.0], target["hbm_gb_per_s"])


def _scaled_sums(problem: MatmulProblem, tile: Tile) -> dict[str, float]:
    """What panguq's W4A16 does on vector cores per weight: it unpacks codes, and scales the sums of
    each block of k."""
    weight = problem.scheme.weight
    assert weight is not None
    sums = tile[0] / tile[2]  # for each weight
    instructions = _SCALE_SUMS + (0 if weight.symmetric else 2 * 2)
    return {
        "dequantize_instructions": _UNPACK[problem.dtype] + instructions * sums,
        "sum_bytes": _FLOAT32 * sums,
    }


def _scheme(
    read: tuple[int, float, float, float, float],
    output_bytes: float,
    fractal_k: float,
    memory_gb_per_s: float,
) -> dict[str, float]:
    names = ("x_parts", "x_bytes", "stored_bytes", "cube_bytes", "scale_bytes")
    return {
        **dict(zip(names, read, strict=True)),
        "output_bytes": output_bytes,
        "fractal_k": fractal_k,
        "memory_gb_per_s": memory_gb_per_s,
        **_UNTIMED,
    }
