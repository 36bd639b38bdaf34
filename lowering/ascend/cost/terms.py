"""The cost of one matmul on an Ascend NPU as sympy expressions, one per term.

    total = launch + load_start + vector_start + dequantize_phase
            + max(cube, core_load, dequantize, vector_traffic, hbm, l2)
            + exposed + store + reduce + epilogue

The terms inside max() overlap: cores load the next blocks, and vector cores prepare the next
weights, while the cube multiplies. The others follow one another. All are microseconds of the
busiest core. CANN's own 8-bit and float matmuls are timed, not taken apart: `Form.timed` has few
terms, fitted to those times, and what cube and memory do not hide of each other is `exposed`.
Every term grows with m or stays, which `envelope.py` relies on.

Symbols: m tokens, n outputs, k inputs; `Form` says which formulas apply; the rest are constants of
the target (`machine.ASCEND_UNITS`), numbers of the scheme (`SCHEME_SYMBOLS`) and the schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sympy
from sympy import Expr, Max, Min, Piecewise, Symbol, ceiling

from panguq.lowering.ascend.machine import ASCEND_UNITS

MEANING = {
    "launch": "starting kernels",
    "load_start": "the first loads, the longer the deeper k is",
    "vector_start": "bringing in the vector cores, the more the more cores take part",
    "dequantize_phase": "dequantizing the whole weight first",
    "cube": "multiplying on the busiest cube core",
    "core_load": "loading blocks into the busiest core",
    "dequantize": "dequantizing on the vector cores",
    "vector_traffic": "moving weights through the vector cores",
    "hbm": "fetching from memory",
    "l2": "traffic through L2",
    "exposed": "what multiplying and fetching do not hide of each other",
    "store": "writing the last block",
    "reduce": "adding partial sums",
    "epilogue": "scaling results on the vector cores",
}
TERMS = tuple(MEANING)
OVERLAPPED = ("cube", "core_load", "dequantize", "vector_traffic", "hbm", "l2")
SERIAL = tuple(name for name in TERMS if name not in OVERLAPPED)
SUM_BYTES = 4  # a partial sum is float32 or int32


def _symbol(name: str) -> Symbol:
    return Symbol(name, positive=True)


M, N, K = _symbol("m"), _symbol("n"), _symbol("k")
SCHEDULE_SYMBOLS = (
    "splits",
    "block_m",
    "block_n",
    "block_k",
    "grid_m",
    "grid_n",
    "tile_vector_cores",  # that dequantize a tile together
    "sum_bytes",  # of sums that vector cores read and scale, per weight
)
SCHEME_SYMBOLS = (
    "x_parts",  # matrices that x is decomposed into (1: none)
    "x_bytes",  # an input's, as the cube loads it
    "stored_bytes",  # a weight's, as it is stored
    "cube_bytes",  # a weight's, as the cube loads it
    "scale_bytes",  # scales and offsets, per weight
    "output_bytes",
    "fractal_k",  # inputs that the cube multiplies in one cycle
    "memory_gb_per_s",  # at which its weights come from memory
)
TIMED_SYMBOLS = (  # of a `Form.timed`
    "load_start_us",  # us/1024 of k
    "exposed",  # share
    "scaling_cycles",  # of a vector core for an output; 0: the cube's own output path scales
    "cube_times",  # 1 where rows are aligned
)
ARGUMENTS = ("m", "n", "k", *SCHEDULE_SYMBOLS, *SCHEME_SYMBOLS, *TIMED_SYMBOLS, *ASCEND_UNITS)
S: dict[str, Symbol] = {name: _symbol(name) for name in ARGUMENTS}

Blocks = Literal["tiles", "rectangles"]
WeightLayout = Literal["kn", "nk", "blocked"]
Dequantize = Literal["never", "ring", "workspace", "vendor"]
Adding = Literal["no one", "all cores", "last program"]


@dataclass(frozen=True)
class Form:
    """Which formulas apply.

    blocks: "tiles" of block_m x block_n that cores take one after another, in waves; or one
    "rectangle" of the result for each core of a grid_m x grid_n grid, cut into blocks inside.
    layout: of the weight in memory: rows along n (`[k, n]`), along k (`[n, k]`), or blocks that
    are read without gaps. mixed: vector cores take part. adding: who adds partial sums where k is
    divided, too: all vector cores after a barrier, or one vector core of the program that is the
    last of its tile.
    dequantize: "ring": vector cores hand each block over through a buffer that stays in L2;
    "workspace": first the whole weight, then the matmul; "vendor": as "ring", at the rate that
    CANN's kernel was timed at. timed: CANN's 8-bit and float matmuls, by their times alone.
    """

    blocks: Blocks
    layout: WeightLayout
    mixed: bool
    adding: Adding = "no one"
    dequantize: Dequantize = "never"
    timed: bool = False

    @property
    def split(self) -> bool:
        """Whether k is divided, too."""
        return self.adding != "no one"


@dataclass(frozen=True)
class _Work:
    """What the busiest core does, and what all cores do together."""

    cores: Expr  # cores that have something to do
    inputs: Expr  # of the busiest core: the k it walks through, all its blocks together
    columns: Expr  # of a block
    fractals: Expr  # cycles of the cube
    x_bytes: Expr  # loaded by the busiest core
    weight_bytes: Expr
    all_blocks: Expr  # blocks of all cores per block of the busiest
    result_bytes: Expr  # of the sums of one block


@functools.cache
def terms(form: Form, fractal: int = 16) -> dict[str, Expr]:
    """Every term of `TERMS` in microseconds; `fractal` is the chip's."""
    work = _tiles(form, fractal) if form.blocks == "tiles" else _rectangles(form, fractal)
    cycles_per_us = S["clock_mhz"]
    sharing = S["tile_vector_cores"]
    weights = work.inputs * work.columns  # that the busiest core multiplies with
    partial_bytes = S["splits"] * M * N * SUM_BYTES if form.split else sympy.Integer(0)
    result = dict.fromkeys(TERMS, sympy.Integer(0))
    result["launch"] = S["launch_us"]
    if form.mixed:
        used = work.cores / S["cube_cores"]
        result["vector_start"] = S["vector_start_us"] + S["vector_start_per_wave_us"] * used
    result["cube"] = work.fractals / cycles_per_us
    loaded = work.x_bytes + work.weight_bytes
    if form.timed and form.layout != "nk":  # of 8-bit operands L1 keeps the smaller
        loaded = Max(work.x_bytes, work.weight_bytes)
    result["core_load"] = loaded / (S["core_load_bytes_per_cycle"] * cycles_per_us)
    hbm_bytes = (
        N * K * (S["stored_bytes"] + S["scale_bytes"])
        + S["x_parts"] * M * K * S["x_bytes"]
        + M * N * S["output_bytes"]
    )
    l2_bytes = (work.x_bytes + work.weight_bytes) * work.all_blocks + partial_bytes
    vector_rate = S["vector_bytes_per_cycle"] * cycles_per_us
    if form.dequantize == "ring":
        read = work.inputs * _padded(work.columns * S["stored_bytes"]) + weights * S["scale_bytes"]
        moved = read + weights * (S["cube_bytes"] + S["sum_bytes"])
        result["dequantize"] = _instructions(weights) / sharing
        result["vector_traffic"] = moved / (sharing * vector_rate)
        l2_bytes += moved * work.all_blocks
    if form.dequantize == "vendor":
        read = weights * (S["stored_bytes"] + S["scale_bytes"])
        rate = S["vendor_dequantize_bytes_per_cycle"] * cycles_per_us
        result["vector_traffic"] = read / (sharing * rate)
        l2_bytes += (read + weights * S["cube_bytes"]) * work.all_blocks
    if form.dequantize == "workspace":
        result["dequantize_phase"], spilled = _whole_workspace(vector_rate)
        # Phase 2 reads the workspace instead of the codes.
        hbm_bytes += spilled - N * K * (S["stored_bytes"] + S["scale_bytes"])
    result["hbm"] = hbm_bytes / (S["memory_gb_per_s"] * 1000)
    if form.timed:
        return _timed(result)
    result["l2"] = l2_bytes / (S["l2_read_bytes_per_cycle"] * cycles_per_us * S["cube_cores"])
    result["store"] = work.result_bytes / (S["l2_write_bytes_per_cycle"] * cycles_per_us)
    result["exposed"] = _exposed(result)
    if form.split:
        result["reduce"] = _adding(form, vector_rate)
    return {name: sympy.sympify(term) for name, term in result.items()}


def _timed(result: dict[str, Expr]) -> dict[str, Expr]:
    """The terms of a kernel of which only times are known."""
    result["load_start"] = S["load_start_us"] * K / 1024
    result["cube"] *= S["cube_times"]
    result["exposed"] = _exposed(result)
    scaling = S["scaling_cycles"] / (S["vector_cores"] * S["clock_mhz"])
    result["epilogue"] = M * N * scaling
    return {name: sympy.sympify(term) for name, term in result.items()}


def _exposed(result: dict[str, Expr]) -> Expr:
    """A share of the smaller of multiplying and fetching follows the larger, unless something else
    takes longer than both; so that this and the largest together never fall as m grows."""
    multiply, fetch = result["cube"], Max(result["hbm"], result["vector_traffic"])
    both = Max(multiply, fetch) + S["exposed"] * Min(multiply, fetch)
    return Max(0, both - Max(*(result[name] for name in OVERLAPPED)))


@functools.cache
def total(form: Form) -> Expr:
    """The whole cost in microseconds."""
    parts = terms(form)
    overlapped = Max(*(parts[name] for name in OVERLAPPED), evaluate=False)
    return sympy.Add(*(parts[name] for name in SERIAL), overlapped)


@functools.cache
def compiled(form: Form, fractal: int) -> Callable[..., Any]:
    """`terms` as a function of numbers or numpy arrays, in the order of `ARGUMENTS`."""
    values = list(terms(form, fractal).values())
    function: Callable[..., Any] = sympy.lambdify(
        [S[name] for name in ARGUMENTS], values, modules="numpy", cse=True
    )
    return function


def _tiles(form: Form, fractal: int) -> _Work:
    block_m, block_n, block_k = S["block_m"], S["block_n"], S["block_k"]
    splits = S["splits"] if form.split else 1
    programs = ceiling(M / block_m) * ceiling(N / block_n) * splits
    waves = ceiling(programs / S["cube_cores"])
    steps = waves * ceiling(ceiling(K / block_k) / splits)
    columns = Min(block_n, N)
    fractals = (
        ceiling(block_m / fractal) * ceiling(block_n / fractal) * ceiling(block_k / S["fractal_k"])
    )
    rows = Min(block_m, M)
    return _Work(
        cores=Min(programs, S["cube_cores"]),
        inputs=steps * block_k,
        columns=columns,
        fractals=steps * fractals,
        x_bytes=steps * rows * _padded(block_k * S["x_bytes"]),
        weight_bytes=steps * _weight_bytes(form, columns, block_k),
        all_blocks=programs / waves,
        result_bytes=rows * columns * SUM_BYTES,
    )


def _rectangles(form: Form, fractal: int) -> _Work:
    block_k = S["block_k"]
    rows = S["x_parts"] * M
    core_m = fractal * ceiling(ceiling(rows / fractal) / S["grid_m"])
    core_n = fractal * ceiling(ceiling(N / fractal) / S["grid_n"])
    steps = ceiling(K / block_k)
    over_m, over_n = ceiling(core_m / S["block_m"]), ceiling(core_n / S["block_n"])
    columns = Min(S["block_n"], core_n)
    cores = Min(S["grid_m"], ceiling(rows / fractal)) * Min(S["grid_n"], ceiling(N / fractal))
    loaded_rows = Min(core_m, rows)
    return _Work(
        cores=cores,
        inputs=K * over_n * over_m,
        columns=columns,
        fractals=core_m / fractal * core_n / fractal * ceiling(K / S["fractal_k"]),
        x_bytes=over_n * steps * loaded_rows * _padded(block_k * S["x_bytes"]),
        weight_bytes=over_m * over_n * steps * _weight_bytes(form, columns, block_k),
        all_blocks=cores,
        result_bytes=Min(loaded_rows, S["block_m"]) * columns * SUM_BYTES,
    )


def _weight_bytes(form: Form, columns: Expr, block_k: Expr) -> Expr:
    """What the cube loads of the weight for one block of k."""
    if form.dequantize != "never" or form.layout == "blocked":
        return columns * block_k * S["cube_bytes"]
    if form.layout == "kn":
        row = columns * S["cube_bytes"]
        whole = S["memory_unit_bytes"] / 2
        if form.timed:  # by its times, rows of half a unit move as fast as whole ones
            halves = whole * ceiling(row / whole)
            return block_k * Piecewise((_padded(row), row < whole), (halves, True))
        return block_k * _padded(row)
    return columns * _padded(block_k * S["cube_bytes"])


def _padded(row_bytes: Expr) -> Expr:
    """Memory moves whole units: a shorter row costs as much as a unit."""
    return S["memory_unit_bytes"] * ceiling(row_bytes / S["memory_unit_bytes"])


def _instructions(weights: Expr) -> Expr:
    """Microseconds that one vector core takes to dequantize so many weights."""
    return weights * S["dequantize_instructions"] / (S["vector_lanes"] * S["clock_mhz"])


def _adding(form: Form, vector_rate: Expr) -> Expr:
    """Microseconds to read and add partial sums."""
    cycles_per_us = S["clock_mhz"]
    if form.adding == "all cores":
        sums, heads = S["splits"] * M * N / S["vector_cores"], sympy.Integer(0)
    else:
        tiles = ceiling(M / S["block_m"]) * ceiling(N / S["block_n"])
        rows, columns = Min(S["block_m"], M), Min(S["block_n"], N)
        sums = ceiling(tiles / S["cube_cores"]) * S["splits"] * rows * columns
        heads = S["arrival_cycles"] / cycles_per_us
    return heads + sums * SUM_BYTES / vector_rate + sums / (S["vector_lanes"] / 2 * cycles_per_us)


def _whole_workspace(vector_rate: Expr) -> tuple[Expr, Expr]:
    """Microseconds to dequantize the whole weight on all vector cores, and the bytes of the
    workspace that the matmul must then fetch from memory, because L2 could not keep them."""
    written = N * K * S["cube_bytes"]
    stored = N * K * (S["stored_bytes"] + S["scale_bytes"])
    spilled = Max(0, written - S["l2_mib"] * 2**20)
    phase = Max(
        _instructions(N * K) / S["vector_cores"],
        (stored + written) / (S["vector_cores"] * vector_rate),
        (stored + spilled) / (S["memory_gb_per_s"] * 1000),
    )
    return phase, spilled
