"""Ops of a mixture of experts: gating, rows moved and added up, matmuls of many weights.

A grouped matmul is `start + max(core, memory) + exposed x the smaller one`: the busiest core's
blocks, and what memory moves. The fused int8 one also lays its weight out anew (`TransData`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.call import Constants, OpModel, Price, VendorCall, combined
from panguq.lowering.ascend.op_times.vector import memory_us
from panguq.lowering.target import Cost

_MEANING: Mapping[str, str] = {
    "start_us": "us until the first rows are there, and after the last",
    "row_cycles": "cycles of a vector core for a row that is read",
    "element_cycles": "cycles of a vector core for an element of a row",
    "run_us": "us of a rank's rows for an expert, which lie together",
    "choice_cycles": "cycles of a vector core for a token's choice of one expert",
    "l2_gb_per_s": "GB/s of what fits L2",
    "memory_gb_per_s": "GB/s of what does not",
    "load_bytes_per_cycle": "bytes that a cube core loads in a cycle",
    "exposed": "share of the smaller of cube and memory that the larger does not hide",
    "unaligned": "times as long where rows begin at no multiple of 32 bytes",
    "layout_gb_per_s": "GB/s of a weight that is laid out anew and fits L2 twice",
    "layout_spill_gb_per_s": "GB/s of the part of it that does not",
}


def group_rows(group_list: Sequence[int]) -> list[int]:
    """Rows of each expert from cumulative sums. Raises ValueError where they fall."""
    rows = [last - first for first, last in zip([0, *group_list], group_list, strict=False)]
    if not rows or min(rows) < 0:
        raise ValueError(f"group_list {list(group_list)} is not a rising list of sums")
    return rows


@dataclass(frozen=True)
class GroupedWork:
    """Every expert's matmul `[rows, k] x [k, n]`: bytes of an element as memory holds it and as a
    core loads it, and the depth of the cube's block."""

    n: int
    k: int
    x_bytes: float
    stored_bytes: float
    """Of a weight in memory, its share of the scales included."""
    loaded_bytes: float
    """Of a weight as the cube multiplies it."""
    output_bytes: float
    fractal_k: float
    x_parts: float = 1
    """How many codes an element of x is multiplied as."""


def rows_cost(rows: Sequence[int], work: GroupedWork, machine: AscendMachine, c: Constants) -> Cost:
    """`start + max(core, memory) + exposed x the smaller one` for the rows of each expert; weights
    of experts without rows are not read."""
    core = grouped_us(rows, work, machine, c)
    if work.k * work.x_bytes % 32 or work.n * work.loaded_bytes % 32:
        core *= c["unaligned"]
    active = sum(count > 0 for count in rows)
    moved = active * work.n * work.k * work.stored_bytes
    moved += sum(rows) * (work.k * work.x_bytes * work.x_parts + work.n * work.output_bytes)
    terms = {"cube": core, "memory": memory_us(moved, machine, c)}
    return combined({"start": c["start_us"]}, terms, c["exposed"])


def grouped_us(
    rows: Sequence[int], work: GroupedWork, machine: AscendMachine, c: Constants
) -> float:
    """The busiest core's microseconds; the best of the vendor's blocks and their halves counts."""
    cores, clock, chip = int(machine["cube_cores"]), machine["clock_mhz"], machine.chip
    steps = -(-work.k // work.fractal_k) * work.x_parts
    best = float("inf")
    for block_m, block_n in chip.vendor_blocks:
        for share in (1, 2, 4):
            tall, wide = block_m, max(chip.fractal, block_n // share)
            across, times = -(-work.n // wide), list[tuple[float, int]]()
            for height, count in _heights(rows, tall).items():
                columns = min(wide, work.n)
                cube = steps * -(-height // chip.fractal) * -(-columns // chip.fractal)
                loaded = work.k * (height * work.x_bytes + columns * work.loaded_bytes)
                times.append(
                    (max(cube, loaded / c["load_bytes_per_cycle"]) / clock, count * across)
                )
            best = min(best, _longest(times, cores))
    return best


def _heights(rows: Sequence[int], tall: int) -> Counter[int]:
    found: Counter[int] = Counter()
    for count in rows:
        whole, rest = divmod(count, tall)
        found[tall] += whole
        found[rest] += 1
    del found[0]
    return +found


def _longest(times: list[tuple[float, int]], cores: int) -> float:
    """The busiest core's time where blocks go round the cores, the dearest first."""
    total, taken = 0.0, 0
    for us, blocks in sorted(times, reverse=True):
        free = -taken % cores
        total += -(-max(blocks - free, 0) // cores) * us
        taken += blocks
    return total


def _grouped(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """x `[rows, k]`, weights `[experts, k, n]`, or `[experts, n, k]` with transpose_weight."""
    weight = call.shape(1)
    n = weight[1] if call.attrs.get("transpose_weight") else weight[2]
    return rows_cost(group_rows(call.attrs["group_list"]), _work(call, n, machine), machine, c)


def _work(call: VendorCall, n: int, machine: AscendMachine) -> GroupedWork:
    size, weight = call.size(0), call.size(1)
    depth = machine.chip.fractal_k.get(size, 4)
    return GroupedWork(n, call.shape(0)[1], size, weight, size, size, depth)


def _grouped_swiglu(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """x int8 `[rows, k]`, weights int8 `[experts, k, n]` to codes `[rows, n / 2]`."""
    (total, k), (experts, _, n) = call.shape(0), call.shape(1)
    core = grouped_us(group_rows(call.attrs["group_list"]), _work(call, n, machine), machine, c)
    weight = experts * n * k
    spilled = max(0.0, 1 - machine["l2_mib"] * 2**20 / (2 * weight)) * weight
    layout = (weight - spilled) / c["layout_gb_per_s"] + spilled / c["layout_spill_gb_per_s"]
    memory = memory_us(weight + total * (k + n // 2), machine, c)
    serial = {"start": c["start_us"], "layout": layout / 1000}
    return combined(serial, {"cube": core, "memory": memory}, c["exposed"])


def _finalize(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """Experts' rows `[rows, w]`, where they are, skips, biases, scales `[tokens, k]` and choices:
    each token's rows weighed and added to its skips."""
    width, size = call.shape(0)[-1], call.size(0)
    tokens, chosen = call.shape(6)
    skips = call.has(2) + call.has(3)
    per_core = ceil(tokens / machine["vector_cores"])
    reads = chosen * (c["row_cycles"] + width * c["element_cycles"])
    adds = (skips + 1) * width * c["element_cycles"]
    vector = per_core * (reads + adds) / machine["clock_mhz"]
    moved = tokens * (chosen * (2 if call.has(4) else 1) + skips + 1) * width * size
    return combined(
        {"start": c["start_us"]}, {"vector": vector, "memory": memory_us(moved, machine, c)}
    )


def _unpermute(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """Experts' rows `[rows, w]`, where they are `[rows]`, and each token's weights `[tokens, k]`,
    if there are any: each token's rows weighed and added up."""
    (rows, width), kind = call.shape(0), call.dtypes[0]
    tokens, chosen = call.shape(2) if call.has(2) else (rows, 1)
    shapes = ((rows, width), None, None, None, None, (rows,), (tokens, chosen))
    whole = VendorCall(call.op, shapes, (kind, None, None, None, None, "int32", "int32"))
    return _finalize(whole, machine, c)


def _re_routing(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """Rows `[rows, w]` that lie by rank and expert `[ranks, experts]` moved to lie by expert."""
    memory = memory_us(2 * call.bytes(0), machine, c)
    runs = call.elements(1) * c["run_us"]
    return combined({"start": c["start_us"], "runs": runs, "memory": memory})


def _init_routing(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """Tokens `[t, w]`, each brought to the experts of its row of ids `[t, k]`: every row moves by
    itself, the cores sharing them; the sort of the ids, which no published row has, is missing."""
    rows = call.shape(0)[0] * call.shape(1)[1]
    memory = memory_us(2 * call.bytes(0) * call.shape(1)[1], machine, c)
    moving = ceil(rows / machine["vector_cores"]) * c["run_us"]
    return combined({"start": c["start_us"], "rows": moving, "memory": memory})


def _gating(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """Logits `[tokens, experts]`: softmax, then the best k one after another."""
    tokens, experts = call.shape(0)
    chosen = int(call.attrs["k"])
    rows = ceil(tokens / machine["vector_cores"])
    cycles = chosen * c["choice_cycles"] + experts * c["element_cycles"]
    return combined({"start": c["start_us"], "vector": rows * cycles / machine["clock_mhz"]})


def _model(price: Price, first: Mapping[str, float]) -> OpModel:
    return OpModel(price, first, {name: _MEANING[name] for name in first})


_RATES = {"l2_gb_per_s": 2000.0, "memory_gb_per_s": 1200.0}
GROUPED = _model(
    _grouped,
    {"start_us": 6, "load_bytes_per_cycle": 110, "exposed": 0.9, "unaligned": 3, **_RATES},
)
GROUPED_SWIGLU = _model(
    _grouped_swiglu,
    {
        "start_us": 15,
        "load_bytes_per_cycle": 120,
        "exposed": 0.5,
        "layout_gb_per_s": 2600,
        "layout_spill_gb_per_s": 2600,
        **_RATES,
    },
)
FINALIZE = _model(_finalize, {"start_us": 6, "row_cycles": 200, "element_cycles": 0.3, **_RATES})
UNPERMUTE = _model(_unpermute, {"start_us": 6, "row_cycles": 200, "element_cycles": 0.3, **_RATES})
RE_ROUTING = _model(_re_routing, {"start_us": 3, "run_us": 0.04, **_RATES})
INIT_ROUTING = _model(_init_routing, {"start_us": 3, "run_us": 0.04, **_RATES})
GATING = _model(_gating, {"start_us": 5, "choice_cycles": 50, "element_cycles": 1})
