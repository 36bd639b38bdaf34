"""A generation of NPUs as data: what its cores hold, what its kernels take, and how fast it is.

Tiles, candidates, contracts and costs receive a `Chip`. A next generation is one file such as
`atlas_a2.py` and, where its kernels take other dtypes or layouts, the rules that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Tile = tuple[int, int, int]
Number = tuple[float, str]
"""A value, and where it is published, or what it was "fitted to"."""


@dataclass(frozen=True)
class Chip:
    """What the parts of one generation have in common, and the parts.

    kind: what target files call it. memory: bytes of `ub` in each vector core and of `l1`, `l0a`,
    `l0b`, `l0c` in each cube core. fractal: rows, and columns, that the cube multiplies in a cycle;
    fractal_k: the inputs, by bytes of an input. block_bytes: what rows of UB are multiples of, and
    the least that the cube takes of k. largest_dimension: the largest n and k of a quantized
    matmul; w4a8_smallest_refused_k: the first k that the int8 x int4 matmul refuses.
    vendor_blocks: the blocks (m, n) of the result that CANN's tuned tilings take. tiles: what each
    of panguq's own kernels tries, small ones first; what exceeds `memory` is left out.
    constants: numbers of all parts, by the names of `ASCEND_UNITS`; parts: the other ones, by the
    names of targets. foreign_formats: what the cube multiplies and no kernel of panguq reads.
    int4_refusal: why no kernel takes 4-bit integers; None: some do. splits_inputs: whether CANN's
    weight-only matmul splits few inputs into integers instead of dequantizing the weight.
    lists_operators: whether `vendor/operators.py` is of this chip. The rest of an op's limits
    stands in its contract.
    """

    name: str
    kind: str
    memory: Mapping[str, int]
    fractal: int
    fractal_k: Mapping[float, int]
    block_bytes: int
    largest_dimension: int
    w4a8_smallest_refused_k: int
    vendor_blocks: tuple[tuple[int, int], ...]
    tiles: Mapping[str, tuple[Tile, ...]]
    constants: Mapping[str, Number]
    parts: Mapping[str, Mapping[str, Number]]
    foreign_formats: tuple[str, ...] = ()
    int4_refusal: str | None = None
    splits_inputs: bool = True
    lists_operators: bool = True

    @property
    def cube_macs(self) -> int:
        """Products of 16-bit numbers in a cycle of one cube core."""
        return self.fractal * self.fractal * self.fractal_k[2.0]
