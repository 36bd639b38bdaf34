"""Fused attention, with keys of their own or with one latent row a token (MLA), and its prolog.

us = start + mask + max(scores on the busiest cube core, bytes of the cache / memory,
                        heads of the cache a core walks through)
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod

from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.call import Constants, OpModel, Price, VendorCall, combined
from panguq.lowering.ascend.op_times.vector import memory_us
from panguq.lowering.target import Cost

SCORES, SCORE_WIDTH = 128, 128
"""What `score_cycles` are of: so many scores, of heads that wide; narrower ones take as long."""
_MEANING: Mapping[str, str] = {
    "start_us": "us until the first scores, and after the last",
    "mask_us": "us more where a causal mask cuts a prompt",
    "score_cycles": "cycles of a cube core for 128 scores of heads of 128, softmax included",
    "head_us": "us of a core for one head of one sequence, however short",
    "row_block": "rows of scores (heads times queries) that a core makes together",
    "mask_block": "rows and columns of scores that a causal mask leaves out together",
    "l2_gb_per_s": "GB/s of a cache that fits L2",
    "memory_gb_per_s": "GB/s of one that does not",
    "cube_share": "share of the cube's peak",
}


def _visible(queries: int, keys: int, block: int) -> float:
    """The share of scores that a causal mask leaves, in whole blocks; queries are the last."""
    seen = 0
    for first in range(0, queries, block):
        rows = min(block, queries - first)
        last = keys - queries + first + rows
        seen += rows * min(keys, ceil(last / block) * block)
    return seen / (queries * keys)


def _attention(
    scores: int,
    width: float,
    heads: int,
    cache: int,
    sizes: tuple[int, int, bool],
    machine: AscendMachine,
    c: Constants,
) -> Cost:
    queries, keys, causal = sizes
    cores = machine["cube_cores"]
    serial = {"start": c["start_us"]}
    if causal and queries > 16:
        serial["mask"] = c["mask_us"]
        scores = int(scores * _visible(queries, keys, int(c["mask_block"])))
    cycles = scores / SCORES * max(width, SCORE_WIDTH) / SCORE_WIDTH * c["score_cycles"]
    cube = cycles / cores / machine["clock_mhz"]
    overlapped = {"scores": cube, "memory": memory_us(cache, machine, c)}
    if c.get("head_us"):
        overlapped["heads"] = ceil(heads / cores) * c["head_us"]
    return combined(serial, overlapped)


def _shared_heads(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """q `[b, s, heads, d]`, k and v `[b, past, kv_heads, d]`."""
    batch, queries, heads, width = call.shape(0)
    _, keys, kv_heads, _ = call.shape(1)
    sizes = (queries, keys, bool(call.attrs.get("is_causal")))
    cache = call.bytes(1) + call.bytes(2) + 2 * call.bytes(0)
    scores = batch * heads * queries * keys
    return _attention(scores, width, batch * kv_heads, cache, sizes, machine, c)


def _latent(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """q `[b, s, heads, latent]` and its rotary part, the latent and the rotary part of a token
    `[b, past, 1, …]`; in layout BNSD the second and third size change places."""
    q, k = list(call.shape(0)), list(call.shape(2))
    if call.attrs.get("inputLayout") == "BNSD":
        q[1], q[2], k[1], k[2] = q[2], q[1], k[2], k[1]
    batch, queries, heads, _ = q
    keys = k[1]
    block = int(c["row_block"])
    tiles = ceil(batch * ceil(heads * queries / block) / machine["cube_cores"])
    serial = {"start": c["start_us"]}
    seen = 1.0
    if call.attrs.get("is_causal") and queries > 16:
        serial["mask"] = c["mask_us"]
        seen = _visible(queries, keys, int(c["mask_block"]))
    cycles = tiles * block * keys * seen / SCORES * c["score_cycles"]
    moved = call.bytes(2) + call.bytes(3) + 2 * call.bytes(0) + call.bytes(1)
    overlapped = {"scores": cycles / machine["clock_mhz"], "memory": memory_us(moved, machine, c)}
    return combined(serial, overlapped)


def _latent_prolog(call: VendorCall, machine: AscendMachine, c: Constants) -> Cost:
    """Tokens through the matrices that make queries and the latent row: x, five weights, ropes."""
    tokens = prod(call.shape(0)[:-1])
    macs = tokens * sum(call.elements(i) for i in (1, 2, 3, 4))
    peak = machine.chip.cube_macs * machine["cube_cores"] * machine["clock_mhz"]
    moved = sum(call.bytes(i) for i in range(len(call.shapes)))
    rates = {"l2_gb_per_s": c["memory_gb_per_s"], "memory_gb_per_s": c["memory_gb_per_s"]}
    memory = memory_us(moved, machine, rates)
    return combined(
        {"start": c["start_us"], "memory": memory, "cube": macs / peak / c["cube_share"]}
    )


def _model(price: Price, first: Mapping[str, float]) -> OpModel:
    return OpModel(price, first, {name: _MEANING[name] for name in first})


ATTENTION = _model(
    _shared_heads,
    {
        "start_us": 15,
        "mask_us": 5,
        "score_cycles": 60,
        "head_us": 1,
        "mask_block": 128,
        "l2_gb_per_s": 1500,
        "memory_gb_per_s": 1200,
    },
)
LATENT_ATTENTION = _model(
    _latent,
    {
        "start_us": 60,
        "mask_us": 5,
        "score_cycles": 60,
        "row_block": 128,
        "mask_block": 128,
        "l2_gb_per_s": 800,
        "memory_gb_per_s": 800,
    },
)
LATENT_PROLOG = _model(_latent_prolog, {"start_us": 20, "memory_gb_per_s": 1500, "cube_share": 0.5})
