"""Ops of the vector cores: rows are dealt out to the cores, which load, compute and store them.

    us = start + max(rows of the busiest core x (row + width x element), bytes / memory)

A row costs so much however short it is, and each of its elements so much, more where rows do not
begin at multiples of 32 bytes. What fits L2 moves at L2's rate, since timings repeat a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod

from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.call import Constants, OpModel, VendorCall, combined
from panguq.lowering.target import Cost

MEANING: Mapping[str, str] = {
    "start_us": "us until the first row is there, and after the last",
    "row_cycles": "cycles of a vector core for a row, however short",
    "element_cycles": "cycles of a vector core for an element",
    "unaligned": "times as many cycles an element where rows begin at no multiple of 32 bytes",
    "wide": "times as many cycles an element of 4 bytes",
    "l2_gb_per_s": "GB/s of what fits L2",
    "memory_gb_per_s": "GB/s of what does not",
    "slice_us": "us of cutting an odd row in two first",
}
_FIRST: Mapping[str, float] = {
    "start_us": 8,
    "row_cycles": 100,
    "element_cycles": 0.3,
    "l2_gb_per_s": 2000,
    "memory_gb_per_s": 1200,
}


@dataclass(frozen=True)
class RowWork:
    """What a call moves: `rows` of `width` elements of the result, `moved` bytes in and out,
    `size` bytes of an element of the input; widened: short elements are widened row by row."""

    rows: float
    width: float
    moved: float
    size: int
    widened: bool = False

    @property
    def aligned(self) -> bool:
        """Whether rows of the input begin at multiples of 32 bytes."""
        return self.width * self.size % 32 == 0 or (self.widened and self.size < 4)


def vector_model(
    work: Callable[[VendorCall], RowWork], extra: Mapping[str, float] = {}, sliced: bool = False
) -> OpModel:
    """The model of an op whose work this is; `extra` names constants beyond those of all."""

    def price(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
        found = work(call)
        serial = {"start": c["start_us"]}
        if sliced and found.rows == 1 and found.width % 2:
            serial["slice"] = c["slice_us"]
        return combined(serial, row_terms(found, machine, c))

    first = {**_FIRST, **extra}
    return OpModel(price, first, {name: MEANING[name] for name in first})


def row_terms(work: RowWork, machine: AscendMachine, c: Constants) -> dict[str, float]:
    """The two terms that overlap: the busiest vector core, and memory."""
    cores = machine["vector_cores"]
    cut = work.rows < cores and work.width > 2**15  # few long rows are cut among the cores
    rows = work.rows / cores if cut else ceil(work.rows / cores)
    element = c["element_cycles"]
    if not work.aligned:
        element *= c.get("unaligned", 1.0)
    if work.size == 4:
        element *= c.get("wide", 1.0)
    vector = rows * (c["row_cycles"] + work.width * element) / machine["clock_mhz"]
    return {"vector": vector, "memory": memory_us(work.moved, machine, c)}


def memory_us(moved: float, machine: AscendMachine, c: Constants) -> float:
    """Microseconds to move bytes that L2 holds, or does not."""
    fits = moved <= machine["l2_mib"] * 2**20
    return moved / (c["l2_gb_per_s"] if fits else c["memory_gb_per_s"]) / 1000


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    return prod(shape[:-1]), shape[-1]


def dynamic_quant_work(call: VendorCall) -> RowWork:
    """x `[..., w]` to int8 codes and a float32 scale a row."""
    (rows, width), size = _rows(call.shape(0)), call.size(0)
    return RowWork(rows, width, rows * (width * (size + 1) + 4), size)


def rms_norm_work(call: VendorCall) -> RowWork:
    """x `[..., w]`, gamma `[w]`."""
    (rows, width), size = _rows(call.shape(0)), call.size(0)
    return RowWork(rows, width, rows * width * 2 * size, size, widened=True)


def add_rms_norm_quant_work(call: VendorCall) -> RowWork:
    """x1 + x2 `[..., w]`, kept, and normalized to int8 codes."""
    (rows, width), size = _rows(call.shape(0)), call.size(0)
    return RowWork(rows, width, rows * (width * (3 * size + 1) + 4), size)


def swi_glu_work(call: VendorCall) -> RowWork:
    """x is halved along `dim`; each row of the result is one stretch of memory."""
    shape, size = call.shape(0), call.size(0)
    dim = int(call.attrs.get("dim", -1)) % len(shape)
    rows, width = prod(shape[:dim]), prod(shape[dim:]) // 2
    return RowWork(rows, width, rows * width * 3 * size, size)


def dequant_swiglu_quant_work(call: VendorCall) -> RowWork:
    """x `[rows, 2 w]`, int32 sums with scales or floats, to int8 codes `[rows, w]`."""
    (rows, width), size = _rows(call.shape(0)), call.size(0)
    return RowWork(rows, width // 2, rows * (width * size + width // 2 + 4), size)


def softmax_work(call: VendorCall) -> RowWork:
    """Along `dim`: elsewhere than along the last, rows are those of the last all the same."""
    (rows, width), size = _rows(call.shape(0)), call.size(0)
    return RowWork(rows, width, rows * width * 2 * size, size)


def add_rms_norm_work(call: VendorCall) -> RowWork:
    """x1 + x2 `[..., w]`, kept, and normalized; gamma `[w]`."""
    (rows, width), size = _rows(call.shape(0)), call.size(0)
    return RowWork(rows, width, rows * width * 4 * size, size, widened=True)


def quantize_work(call: VendorCall) -> RowWork:
    """x `[..., w]` to int8 codes, by scales that are known."""
    (rows, width), size = _rows(call.shape(0)), call.size(0)
    return RowWork(rows, width, rows * width * (size + 1), size)


def elementwise_work(call: VendorCall) -> RowWork:
    """x `[..., w]` to as many numbers of its dtype."""
    (rows, width), size = _rows(call.shape(0)), call.size(0)
    return RowWork(rows, width, rows * width * 2 * size, size)
