"""Which tiles fit a core: panguq's own memory rule, and tiles for a cost model.

A tile is (block_m, block_n, block_k): what one program keeps of the result and takes of k at a
time. A core pair has these memories (`Chip.memory`; the sizes are those of Atlas A2):

    UB   192 KiB in each of the two vector cores      L0A, L0B  64 KiB each, inputs of the cube
    L1   512 KiB in the cube core                     L0C      128 KiB, sums of the cube

The rule counts the buffers that the kernels in `triton/` need at their fullest moment. Values
that are loaded in a loop have two buffers, so that the next load runs beside the arithmetic. With e
bytes for each element of the cube's inputs (2 for W4A16, 1 for W8A8):

    L1    2 e (block_m block_k + block_k block_n)      both inputs, two buffers
    L0A   2 * 32 block_m                               the cube takes k in steps of 32 bytes at the
    L0B   2 * 32 block_n                               least; two buffers
    L0C   4 block_m block_n                            one buffer: the sum stays until k ends

UB of W4A16, with P = block_k block_n / 2, the packed bytes of one weight tile; the four nibbles of
a word become four tiles of P bytes each:

    packed in two buffers, and the tile that is being made 13 P / 2
    sums: kept, arriving, scaled 16 block_m block_n
    x for its sums, 16-bit in two buffers and float32 8 block_m block_k
    scales, 16-bit in two buffers and float32, and offsets alike 16 block_n

UB at the end of a data-parallel kernel: the sums, 4 bytes each, are scaled and rounded where they
lie, half of the rows in each vector core, beside 3 float32 vectors at most:
2 block_m block_n + 8 block_n + 4 block_m.

UB at the end of a Split-K kernel, where the program that arrives last adds the partial sums of
SUMMED_ROWS rows at a time, all in one vector core: the sum and two buffers of partial sums, 4
bytes each: 12 SUMMED_ROWS block_n, and 1 KiB for flags. Vectors are loaded when the partial sums
are gone.

`dynamic_quant` (1, 1, block_k): two buffers of float32 input (or of 16-bit input beside one of
float32), codes in two buffers, and the 8 bytes for each number that the compiler takes to turn
float32 into int8: 8 + 2 + 8 = 18 block_k, and 1 KiB for single numbers.

block_m and block_n are multiples of 16, the cube's fractal; int8 fractals hold 32 of k and, as the
weight is [k, n], 32 of n; rows of packed int4 are whole 32-byte blocks of UB, so block_n is a
multiple of 64.

What W4A16 and `dynamic_quant` need is not known but from plans of AscendNPU IR's compiler, of which
some were looked at before the rule was written. It was then compared with the compiler on random
tiles within 25 % of each limit, and not changed by what came out
(conformance/triton/tile_rule.py, conformance/results). What it accepts, the compiler accepts with
double buffering, but for one known tile, W4A16's 64 x 128 x 64 with Split-K, which no chip's
`tiles` has. It refuses some that the compiler accepts: L0B never binds there, since the compiler
divides n too; of a W4A16 tile without Split-K each vector core holds a part; the end of W8A8's
Split-K takes less; `dynamic_quant` needs 16 bytes a number where its input has 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.chip import Chip, Tile
from panguq.kernels.ascend.chips import CHIPS

KIB = 1024
SUMMED_ROWS = 16
"""Rows of partial sums that a Split-K kernel adds at a time."""


@dataclass(frozen=True)
class TileMemory:
    """Bytes that a tile needs in each memory of a core pair; `ub` is that of one vector core."""

    ub: int
    l1: int = 0
    l0a: int = 0
    l0b: int = 0
    l0c: int = 0


def legal_tiles(kernel: str, chip: Chip = ATLAS_A2) -> tuple[Tile, ...]:
    """Those of the chip's tiles (block_m, block_n, block_k) of this kernel that fit its memory,
    small ones first."""
    return tuple(tile for tile in chip.tiles[kernel] if _refusal(kernel, tile, chip) is None)


def multiples(kernel: str, chip: Chip = ATLAS_A2) -> Tile:
    """What each side of the kernel's tiles is a multiple of, by the rule above."""
    if kernel == "dynamic_quant":
        return (1, 1, chip.block_bytes)
    if kernel.startswith("w4a16"):
        return (chip.fractal, 2 * chip.block_bytes, chip.fractal_k[2.0])
    return (chip.fractal, chip.fractal_k[1.0], chip.fractal_k[1.0])


def tile_memory(kernel: str, tile: Tile, chip: Chip = ATLAS_A2) -> TileMemory:
    """What the kernel needs at this tile, by the rule above."""
    block_m, block_n, block_k = tile
    if kernel == "dynamic_quant":
        return TileMemory(ub=18 * block_k + KIB)
    is_w4a16 = kernel.startswith("w4a16")
    ub = 0
    if is_w4a16:
        packed = block_k * block_n // 2
        ub = 13 * packed // 2 + 16 * block_m * block_n + 8 * block_m * block_k + 16 * block_n
    if kernel.endswith("data_parallel"):
        ub = max(ub, 2 * block_m * block_n + 8 * block_n + 4 * block_m)
    if kernel.endswith("split_k"):
        ub = max(ub, 12 * SUMMED_ROWS * block_n + KIB)
    return TileMemory(
        ub=ub,
        l1=2 * (2 if is_w4a16 else 1) * (block_m + block_n) * block_k,
        l0a=2 * chip.block_bytes * block_m,
        l0b=2 * chip.block_bytes * block_n,
        l0c=4 * block_m * block_n,
    )


def tile_refusal(kernel: str, tile: Tile, chip: Chip | None = None) -> str | None:
    """Why the kernel cannot have this tile: a side that does not align, or a memory too small.

    Without a chip, as an op is called that does not say its own: on none of those known.
    """
    if chip is not None:
        return _refusal(kernel, tile, chip)
    reasons = [_refusal(kernel, tile, known) for known in CHIPS.values()]
    return None if None in reasons else reasons[0]


def _refusal(kernel: str, tile: Tile, chip: Chip) -> str | None:
    for name, size, multiple in zip(
        ("block_m", "block_n", "block_k"), tile, multiples(kernel, chip), strict=True
    ):
        if size < 1 or size % multiple:
            return f"{name}={size} is not a positive multiple of {multiple}"
    memory = tile_memory(kernel, tile, chip)
    for name, capacity in chip.memory.items():
        needed = getattr(memory, name)
        if needed > capacity:
            return f"tile {tile} needs {needed} bytes of {name.upper()}, which has {capacity}"
    return None


def split_bounds(k: int, block_k: int, splits: int) -> list[tuple[int, int]]:
    """First and last + 1 input of each part of k: whole blocks, as evenly as they go.

    Split s has the blocks from s * blocks // splits on, blocks = ceil(k / block_k). A part is empty
    only where there are more splits than blocks.
    """
    blocks = -(-k // block_k)
    edges = [min(split * blocks // splits * block_k, k) for split in range(splits + 1)]
    return list(pairwise(edges))
