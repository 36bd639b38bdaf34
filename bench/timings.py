"""Published timings of matmuls on Ascend NPUs, and the cost model's answer to each.

The files in `bench/data` say where each figure is published.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from panguq.ir.quant_spec import SCHEMES, parse_scheme
from panguq.lowering.ascend.candidates import split_counts
from panguq.lowering.ascend.cost.executions import Execution, own_execution, scheme_numbers
from panguq.lowering.ascend.cost.model import cost, execution_cost
from panguq.lowering.ascend.cost.terms import Form, WeightLayout
from panguq.lowering.problem import Candidate, Dtype, MatmulProblem, Tile
from panguq.lowering.target import Constant, Cost, Target
from panguq.lowering.targets import find_target

DATA = Path(__file__).parent / "data"
CATLASS_INT8_TILE = (128, 256, 512)
INT8_TILES: tuple[Tile, ...] = (
    (128, 256, 512),
    (64, 256, 512),
    (256, 128, 512),
    (32, 256, 512),
    (16, 256, 512),
    (64, 512, 256),
)


def read(name: str) -> list[dict[str, str]]:
    """The rows of a file in `bench/data`; lines that begin with # are comments."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def with_constants(target: Target, **values: float) -> Target:
    """The target with other values of some constants."""
    changed = {
        name: Constant(value, target.constants[name].unit, target.constants[name].source)
        for name, value in values.items()
    }
    return replace(target, constants={**target.constants, **changed})


# --- the fit of launch_us and core_load_bytes_per_cycle -----------------------------------------


@dataclass(frozen=True)
class Timing:
    """A published W8A8 timing."""

    m: int
    n: int
    k: int
    splits: int
    us: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """m, n, k."""
        return self.m, self.n, self.k


@dataclass(frozen=True)
class Fit:
    """The two fitted constants."""

    launch_us: float
    core_load_bytes_per_cycle: float

    def target(self, base: Target) -> Target:
        """`base` with these constants."""
        return with_constants(
            base,
            launch_us=self.launch_us,
            core_load_bytes_per_cycle=self.core_load_bytes_per_cycle,
        )


def w8a8_timings() -> list[Timing]:
    """The eight published timings, data-parallel and Split-K of four shapes."""
    rows = read("w8a8_split_k.csv")
    sizes = ("m", "n", "k", "splits")
    return [Timing(*(int(row[name]) for name in sizes), us=float(row["us"])) for row in rows]


def hot(target: Target) -> Target:
    """The target for calls that are repeated on operands that L2 holds: memory is out of the way.
    So are CATLASS' timings of 0.3 to 20 MB. A model's weights come from memory at every step."""
    return with_constants(target, int8_memory_gb_per_s=target["hbm_gb_per_s"], int8_exposed=1e-9)


def predict(timing: Timing, target: Target) -> Cost:
    """The cost of CATLASS' kernel, which adds partial sums without a second launch."""
    target = hot(target)
    split = "split_k" if timing.splits > 1 else "data_parallel"
    problem = MatmulProblem(*timing.shape, SCHEMES["W8A8"])
    candidate = Candidate("catlass", None, split, timing.splits, CATLASS_INT8_TILE, "int8")
    return execution_cost(own_execution(candidate, problem, target, all_add=True), problem, target)


def fit(timings: Sequence[Timing], base: Target) -> Fit:
    """Least squares of relative errors. With what bounds each timing fixed, the cost is linear in
    the launch and in the time per loaded byte; so it is solved and bounds are taken anew until
    they stay."""
    found = Fit(base["launch_us"], base["core_load_bytes_per_cycle"])
    bounds: list[str] = []
    for _ in range(20):
        target = found.target(base)
        costs = [predict(timing, target) for timing in timings]
        if [c.bound_by for c in costs] == bounds:
            return found
        bounds = [c.bound_by for c in costs]
        rows, wanted = [], []
        for timing, c in zip(timings, costs, strict=True):
            cycles = c.terms["core_load"] * found.core_load_bytes_per_cycle
            loading = c.bound_by == "core_load"
            rest = c.total_us - found.launch_us - (c.terms["core_load"] if loading else 0.0)
            rows.append([1 / timing.us, (cycles if loading else 0.0) / timing.us])
            wanted.append(1 - rest / timing.us)
        solution = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
        found = Fit(float(solution[0]), float(1 / solution[1]))
    return found


def left_out(timing: Timing, timings: Sequence[Timing], base: Target, shape: bool) -> Cost:
    """The prediction of a fit to the other timings, or to those of the other shapes."""
    others = [t for t in timings if (t.shape != timing.shape if shape else t != timing)]
    return predict(timing, fit(others, base).target(base))


# --- the fit of vendor_dequantize_bytes_per_cycle -----------------------------------------------


@dataclass(frozen=True)
class W4A16Timing:
    """A third party's timing of npu_weight_quant_batchmatmul on 910B1."""

    m: int
    n: int
    k: int
    group_size: int
    us: float

    def predict(self, target: Target) -> Cost:
        """The cost by the target's constants."""
        scheme = parse_scheme(f"W4A16-g{self.group_size}")
        problem = MatmulProblem(self.m, self.n, self.k, scheme, dtype="float16")
        return cost(Candidate("npu_weight_quant_batchmatmul", storage="int4"), problem, target)


def w4a16_timings() -> list[W4A16Timing]:
    """The three timings."""
    names = ("m", "n", "k", "group_size")
    rows = read("w4a16_910b1.csv")
    return [W4A16Timing(*(int(row[name]) for name in names), us=float(row["us"])) for row in rows]


def fit_vendor_dequantize(timings: Sequence[W4A16Timing], base: Target) -> float:
    """Bytes per cycle by least squares of relative errors, of the timings that CANN's dequantizing
    kernel explains (group 32; CANN multiplies integers for group 128 and small m)."""
    name = "vendor_dequantize_bytes_per_cycle"
    slopes, wanted = [], []
    for timing in timings:
        found = timing.predict(base)
        if not found.how.startswith("dequantize"):
            continue
        slopes.append(found.terms["vector_traffic"] * base[name] / timing.us)
        serial = sum(found.terms[term] for term in ("launch", "vector_start", "store"))
        wanted.append((timing.us - serial) / timing.us)
    x, y = np.array(slopes), np.array(wanted)
    return float((x @ x) / (x @ y))


# --- schedules ----------------------------------------------------------------------------------


def tile_execution(
    problem: MatmulProblem,
    tile: Tile,
    splits: int,
    layout: WeightLayout,
    target: Target,
    exposed: float = 0.0,
) -> Execution:
    """A kernel that multiplies what is stored, in tiles, and adds partial sums by itself. Where m
    is less than a tile has rows, it multiplies m rows, in sixteens, as CATLASS' kernels do.
    exposed: the share of multiplying and fetching that do not hide each other."""
    rows = min(tile[0], -(-problem.m // 16) * 16) if problem.m else tile[0]
    numbers = scheme_numbers(problem, target)
    numbers |= dict(zip(("block_m", "block_n", "block_k"), (rows, *tile[1:]), strict=True))
    numbers |= {"splits": splits, "grid_m": 1, "grid_n": 1, "tile_vector_cores": 2}
    numbers |= {"exposed": exposed}
    mixed = splits > 1 or problem.scheme.activation is not None
    form = Form("tiles", layout, mixed=mixed, adding="all cores" if splits > 1 else "no one")
    spelled = "x".join(map(str, tile))
    return Execution(form, numbers, f"{spelled}, {splits} splits")


def best_whole(
    problem: MatmulProblem, tiles: Sequence[Tile], layout: WeightLayout, target: Target
) -> Cost:
    """The cheapest without Split-K over tiles."""
    found = [
        execution_cost(tile_execution(problem, tile, 1, layout, target), problem, target)
        for tile in tiles
    ]
    return min(found, key=lambda c: c.total_us)


def best_split_k(
    problem: MatmulProblem,
    tiles: Sequence[Tile],
    layout: WeightLayout,
    target: Target,
    exposed: float = 0.0,
) -> Cost:
    """The cheapest Split-K over tiles and numbers of splits, with one launch."""
    found = [
        tile_execution(problem, tile, splits, layout, target, exposed)
        for tile in tiles
        for splits in split_counts(int(target["cube_cores"]))
        if splits <= -(-problem.k // tile[2])
    ]
    return min((execution_cost(e, problem, target) for e in found), key=lambda c: c.total_us)


@dataclass(frozen=True)
class Tuned:
    """A shape of CANN's tuned tilings with its schedule, and the model's answer."""

    target: str
    problem: MatmulProblem
    schedule: str
    whole_us: float
    split_us: float

    @property
    def predicted(self) -> str:
        """The cheaper schedule by the model."""
        return "data_parallel" if self.whole_us <= self.split_us else "split_k"


def tuned_schedules(weight_format: str = "NZ") -> list[Tuned]:
    """All rows. int8 weights in `weight_format`, float32 ones `[n, k]`, as the file's are."""
    found = []
    for row in read("tuned_schedules.csv"):
        target = find_target(row["target"])
        for m in map(int, row["m"].split()):
            dtype: Dtype = "float32" if row["dtype"] == "float32" else "bfloat16"
            scheme = SCHEMES["FLOAT" if dtype == "float32" else "W8A8"]
            nz = weight_format == "NZ" and dtype != "float32"
            problem = MatmulProblem(
                m,
                int(row["n"]),
                int(row["k"]),
                scheme,
                dtype=dtype,
                weight_format="NZ" if nz else "ND",
            )
            layout: WeightLayout = "nk" if scheme.is_float else "blocked" if nz else "kn"
            tiles = float32_tiles() if scheme.is_float else INT8_TILES
            # float32's tilings are rectangles; 8-bit ones are compared in one form, tile by tile
            if scheme.is_float:
                whole = cost(Candidate("linear"), problem, target).total_us
            else:
                whole = best_whole(problem, tiles, layout, target).total_us
            split = best_split_k(problem, tiles, layout, target).total_us
            found.append(Tuned(row["target"], problem, row["schedule"], whole, split))
    return found


def float32_tiles() -> list[Tile]:
    """Tiles whose float32 sums fit L0C."""
    return [(m, n, 128) for m in (16, 32, 64, 96, 128) for n in (64, 128, 256) if m * n <= 32768]


def other_matmuls() -> list[tuple[dict[str, str], Cost]]:
    """Timings that nothing is fitted to, each with its prediction on a 910B3 or 910B2."""
    found = []
    for row in read("other_matmuls.csv"):
        target = find_target("ascend910b3" if row["cores"] == "20" else "ascend910b2")
        dtype: Dtype = "bfloat16" if row["dtype"] == "int8" else row["dtype"]  # type: ignore[assignment]
        scheme = SCHEMES["W8A8" if row["dtype"] == "int8" else "FLOAT"]
        sizes = (int(row[name]) for name in ("m", "n", "k"))
        problem = MatmulProblem(*sizes, scheme, dtype=dtype)
        tile = tuple(map(int, row["tile"].split("x")))
        layout: WeightLayout = row["weight"]  # type: ignore[assignment]
        # int8 ones are repeated calls of the same examples that constants are fitted to
        given = target if scheme.is_float else hot(target)
        execution = tile_execution(problem, tile, 1, layout, given)  # type: ignore[arg-type]
        found.append((row, execution_cost(execution, problem, given)))
    return found
