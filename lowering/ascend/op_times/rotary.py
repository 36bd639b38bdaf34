"""Rotary embedding as torch_npu runs it from half-width tables: several kernels one after another.
A kernel that moves numbers, whatever it does with each, costs what one of these does.

us = kernels x start + bytes / memory + transposed rows + widened table entries
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod

from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.call import Constants, OpModel, VendorCall, combined
from panguq.lowering.ascend.op_times.vector import memory_us
from panguq.lowering.target import Cost

_MEANING: Mapping[str, str] = {
    "start_us": "us of each kernel",
    "l2_gb_per_s": "GB/s of queries and keys that fit L2",
    "memory_gb_per_s": "GB/s of those that do not",
    "transposed_row_cycles": "cycles of a vector core for a head's row that changes its place",
    "repeat_cycles": "cycles of a vector core for an entry of a table repeated pair by pair",
}
_HALF, _PAIRS, _TRANSPOSED = 5, 7, 4  # kernels: the op, two or six for the tables; transposes


def _rotary(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """q, k `[b, s, n, d]` (layout 1: `[b, n, s, d]`), cos and sin `[s, d / 2]`."""
    shape = call.shape(0)
    per_core = 1 / (machine["vector_cores"] * machine["clock_mhz"])
    pairs, turned = call.attrs.get("rotaryMode") == "interleaved", call.attrs.get("layout") == 1
    kernels = (_PAIRS if pairs else _HALF) + (_TRANSPOSED if turned else 0)
    moved = 2 * (call.bytes(0) + call.bytes(1))
    terms = {"start": kernels * c["start_us"], "memory": memory_us(moved, machine, c)}
    if turned:
        rows = 2 * (call.elements(0) + call.elements(1)) / shape[-1]
        terms["transpose"] = ceil(rows) * c["transposed_row_cycles"] * per_core
    if pairs:
        tokens = shape[0] * (shape[2] if turned else shape[1])
        terms["tables"] = prod((tokens, shape[-1])) * c["repeat_cycles"] * per_core
    return combined(terms)


def _rotary_mul(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """x `[b, s, n, d]` or another order of these, cos and sin `[b, s, 1, d]`: one kernel."""
    moved = 2 * call.bytes(0) + call.bytes(1) + call.bytes(2)
    return combined({"start": c["start_us"], "memory": _moving_us(moved, machine, c)})


def _moved(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """All operands, inputs and results alike, are read or written once."""
    moved = sum(call.bytes(index) for index in range(len(call.shapes)))
    return combined({"start": c["start_us"], "memory": _moving_us(moved, machine, c)})


def _moving_us(moved: float, machine: AscendMachine, c: Constants) -> float:
    """All timed rows fit L2, so that of others they say nothing: those move at memory's peak."""
    peak = min(c["memory_gb_per_s"], machine["hbm_gb_per_s"])
    return memory_us(moved, machine, {**c, "memory_gb_per_s": peak})


_FIRST: Mapping[str, float] = {
    "start_us": 5,
    "l2_gb_per_s": 2500,
    "memory_gb_per_s": 2500,
    "transposed_row_cycles": 25,
    "repeat_cycles": 3,
}
ROTARY = OpModel(_rotary, _FIRST, _MEANING)
ROTARY_MUL = OpModel(_rotary_mul, _FIRST, _MEANING)
MOVED = OpModel(_moved, _FIRST, _MEANING)
