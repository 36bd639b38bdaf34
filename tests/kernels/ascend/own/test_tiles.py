"""The memory rule for tiles, and how Split-K divides k."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.own.tiles import (
    SUMMED_ROWS,
    legal_tiles,
    split_bounds,
    tile_memory,
    tile_refusal,
)

KERNELS = (
    "w4a16_data_parallel",
    "w4a16_split_k",
    "w8a8_data_parallel",
    "w8a8_split_k",
    "dynamic_quant",
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_legal_tile_fits(kernel):
    assert legal_tiles(kernel)
    assert {tile: tile_refusal(kernel, tile) for tile in legal_tiles(kernel)} == dict.fromkeys(
        legal_tiles(kernel)
    )


def test_both_schedules_have_the_same_tiles():
    """So a cost model may change the number of splits and keep the tile."""
    for scheme in ("w4a16", "w8a8"):
        assert legal_tiles(f"{scheme}_data_parallel") == legal_tiles(f"{scheme}_split_k")


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_usual_group_has_a_tile(group_size):
    assert [tile for tile in legal_tiles("w4a16_split_k") if group_size % tile[2] == 0]


def test_memory_of_a_tile():
    memory = tile_memory("w8a8_split_k", (128, 256, 512))
    assert memory.l1 == 2 * (128 + 256) * 512
    assert memory.l0c == ATLAS_A2.memory["l0c"] == 4 * 128 * 256
    assert memory.ub == 12 * SUMMED_ROWS * 256 + 1024  # while partial sums are added


@pytest.mark.parametrize(
    ("kernel", "tile", "reason"),
    [
        ("w8a8_split_k", (128, 288, 256), "needs 147456 bytes of L0C, which has 131072"),
        ("w8a8_split_k", (128, 256, 704), "needs 540672 bytes of L1, which has 524288"),
        ("w8a8_data_parallel", (16, 1056, 32), "L0B"),
        ("w4a16_split_k", (32, 256, 64), "needs 204800 bytes of UB, which has 196608"),
        ("w8a8_split_k", (16, 1024, 32), "UB"),
        ("dynamic_quant", (1, 1, 16384), "UB"),
        ("w8a8_data_parallel", (8, 256, 256), "block_m=8 is not a positive multiple of 16"),
        ("w8a8_data_parallel", (16, 48, 256), "block_n=48 is not a positive multiple of 32"),
        ("w4a16_data_parallel", (16, 96, 64), "block_n=96 is not a positive multiple of 64"),
        ("w4a16_data_parallel", (16, 64, 0), "block_k=0 is not a positive multiple of 16"),
    ],
)
def test_refused_tiles(kernel, tile, reason):
    assert reason in tile_refusal(kernel, tile)


@given(k=st.integers(1, 3000), block_k=st.sampled_from([16, 32, 100]), splits=st.integers(1, 40))
def test_parts_of_k_are_whole_blocks_and_all_of_k_once(k, block_k, splits):
    bounds = split_bounds(k, block_k, splits)
    assert len(bounds) == splits
    assert [start for start, _ in bounds] == [0, *[stop for _, stop in bounds[:-1]]]
    assert bounds[-1][1] == k
    assert all(start % block_k == 0 or start == k for start, _ in bounds)
    blocks = [-(-(stop - start) // block_k) for start, stop in bounds]
    assert max(blocks) - min(blocks) <= 1
