"""What a mixture of experts costs on an NPU, for the rows that each expert gets.

How many rows an expert gets is not known before a model runs. `typical_rows` is what independent
tokens make of it, `worst_us` the dearer of two extremes. All numbers rank and inform; nothing was
measured on an NPU by panguq. The constants are fitted to published timings (`bench/data/moe.csv`,
times of kernels without their launch); `bench.experts_cost` states every error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import gammaln

from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.cost.executions import scheme_numbers
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.problem import FLOAT_BYTES, MatmulProblem

# Fitted to the smallest published grouped matmul, of 200 rows: 6.5 us on 910B2.
START_US = 6.0
# Fitted to 6 published MoeFinalizeRoutingV2 and 9 MoeReRouting (910B2): microseconds that a vector
# core takes for a row however short, and before the first.
COMBINE_START_US, COMBINE_ROW_US = 8.5, 0.22
GATHER_START_US, GATHER_ROW_US = 4.0, 0.06


@dataclass(frozen=True)
class GroupedCost:
    """Microseconds of a grouped matmul. The terms add up: published times of kernels show no
    overlap of reading weights and multiplying, unlike those of a single matmul."""

    start: float
    hbm: float  # weights of experts that have rows, rows, results
    core: float  # the busiest core: the cube, or what it loads for it, whichever is slower
    dequantize: float  # weight-only: all weights read, written as floats and read again

    @property
    def total_us(self) -> float:
        """Their sum."""
        return self.start + self.hbm + self.core + self.dequantize


def typical_rows(tokens: int, top_k: int, experts: int) -> list[int]:
    """Rows of each expert when every token chooses by itself, any expert as likely as another.

    An expert's number is binomial; the list holds its quantiles, one an expert, most rows first. It
    adds up to tokens * top_k.
    """
    share = top_k / experts
    if share >= 1:
        return [tokens] * experts
    found = np.arange(tokens + 1)
    log = gammaln(tokens + 1) - gammaln(found + 1) - gammaln(tokens - found + 1)
    chance = np.exp(log + found * math.log(share) + (tokens - found) * math.log1p(-share))
    middles = (np.arange(experts) + 0.5) / experts
    rows = np.searchsorted(chance.cumsum(), middles).clip(0, tokens)[::-1].astype(int)
    # Rounding leaves a few rows over or too many, which go to or come from those in the middle.
    missing, step = tokens * top_k - int(rows.sum()), experts // 2
    while missing:
        change = int(np.sign(missing))
        if 0 <= rows[step % experts] + change <= tokens:
            rows[step % experts] += change
            missing -= change
        step += 1
    return [int(count) for count in np.sort(rows)[::-1]]


def extreme_rows(tokens: int, top_k: int, experts: int) -> tuple[list[int], list[int]]:
    """All tokens with the same experts, and rows spread over as many experts as there can be."""
    rows = tokens * top_k
    spread = [rows // experts + (expert < rows % experts) for expert in range(experts)]
    return [tokens] * top_k + [0] * (experts - top_k), spread


def worst_us(tokens: int, top_k: int, experts: int, cost: Callable[[list[int]], float]) -> float:
    """The dearest of typical rows and both extremes: few weights and long ways, or all weights."""
    kinds = (typical_rows(tokens, top_k, experts), *extreme_rows(tokens, top_k, experts))
    return max(cost(rows) for rows in kinds)


def grouped_cost(rows: Sequence[int], problem: MatmulProblem, target: AscendMachine) -> GroupedCost:
    """What `npu_grouped_matmul` costs; `problem` is one expert's, its m is not read.

    Blocks of the result are taken by the cores one after another, the dearest first; of the
    vendor's block sizes, and halves of them for few rows, the best counts.
    """
    weight = problem.scheme.weight
    weight_only = weight is not None and problem.scheme.activation is None
    numbers = _as_float(problem, target) if weight_only else scheme_numbers(problem, target)
    n, k = problem.n, problem.k
    active, total = sum(count > 0 for count in rows), sum(rows)
    memory = target["hbm_gb_per_s"] * 1000
    stored = weight.bits / 8 if weight is not None else numbers["stored_bytes"]
    moved = total * (k * numbers["x_bytes"] * numbers["x_parts"] + n * numbers["output_bytes"])
    moved += active * n * k * (stored + numbers["scale_bytes"])
    workspace = 2 * active * n * k * numbers["cube_bytes"] if weight_only else 0.0
    core = min(
        _busiest_core(rows, n, k, numbers, target, (block_m // share, block_n))
        for block_m, block_n in target.chip.vendor_blocks
        for share in (1, 2, 4, 8)
        if block_m // share >= target.chip.fractal
    )
    return GroupedCost(START_US, moved / memory, core, workspace / memory)


def combine_us(
    tokens: int, top_k: int, hidden: int, size: int, target: AscendMachine, skips: int = 0
) -> float:
    """`npu_moe_finalize_routing`, of rows of `hidden` numbers of `size` bytes."""
    moved = tokens * (top_k + skips + 1) * hidden * size
    return COMBINE_START_US + _by_rows(tokens * top_k, moved, COMBINE_ROW_US, target)


def route_us(tokens: int, top_k: int, hidden: int, size: int, target: AscendMachine) -> float:
    """Bringing rows together, as `npu_moe_init_routing_v2` does after it has sorted: timed is only
    an op that moves rows in the same way, so that the sort is missing here."""
    rows = tokens * top_k
    return GATHER_START_US + _by_rows(rows, 2 * rows * hidden * size, GATHER_ROW_US, target)


def _by_rows(rows: int, moved: float, row_us: float, target: AscendMachine) -> float:
    each = -(-rows // int(target["vector_cores"]))
    return max(each * row_us, moved / (target["hbm_gb_per_s"] * 1000))


def _as_float(problem: MatmulProblem, target: AscendMachine) -> dict[str, float]:
    """Weight-only: the cube multiplies 16-bit numbers, as without quantization."""
    numbers = scheme_numbers(replace(problem, scheme=SCHEMES["FLOAT"]), target)
    weight = problem.scheme.weight
    assert weight is not None
    scale_bytes = FLOAT_BYTES[problem.dtype] * 2 / problem.group_size  # an offset beside each scale
    return numbers | {"scale_bytes": scale_bytes}


def _busiest_core(
    rows: Sequence[int],
    n: int,
    k: int,
    numbers: dict[str, float],
    target: AscendMachine,
    block: tuple[int, int],
) -> float:
    """Microseconds of a core's blocks: each loads its rows and columns and multiplies them."""
    (block_m, block_n), fractal = block, target.chip.fractal
    columns = min(block_n, n)
    heights: Counter[int] = Counter()
    for count, experts in Counter(rows).items():
        whole, rest = divmod(count, block_m)
        heights[block_m] += whole * experts
        heights[rest] += experts
    del heights[0]
    across, clock = -(-n // block_n), target["clock_mhz"]
    times: list[tuple[float, int]] = []
    for height, blocks in heights.items():
        steps = -(-k // numbers["fractal_k"])
        cube = steps * -(-height // fractal) * -(-columns // fractal) * numbers["x_parts"] / clock
        loaded = k * (height * numbers["x_bytes"] + columns * numbers["cube_bytes"])
        load = loaded / (target["core_load_bytes_per_cycle"] * clock)
        times.append((max(cube, load), blocks * across))
    return _longest(times, int(target["cube_cores"]))


def _longest(times: list[tuple[float, int]], cores: int) -> float:
    """The busiest core's time where blocks, `(us, how many)`, go round the cores, dearest first."""
    total, taken = 0.0, 0
    for us, blocks in sorted(times, reverse=True):
        free = -taken % cores
        waves = -(-max(blocks - free, 0) // cores)
        total += waves * us
        taken += blocks
    return total
