"""panguq's memory rule never accepts what the compiler refuses; the matrix is what is on file."""

from __future__ import annotations

import json

import pytest

from conformance.triton.npu_compiler import compiler_path
from conformance.triton.tile_rule import (
    RESULT,
    SEED,
    TILES_OF_EACH,
    compare_all,
    random_tiles,
    report,
)

if compiler_path() is None:
    pytest.skip("ascendnpu-ir is not installed: run python -m conformance.triton", True)


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    return compare_all(SEED, TILES_OF_EACH, tmp_path_factory.mktemp("tiles"))


def test_every_accepted_tile_compiles_with_double_buffering(comparisons):
    assert not [it for it in comparisons if it.panguq_accepts and not it.double_buffered]


def test_both_verdicts_are_tried(comparisons):
    assert len(comparisons) >= 60
    assert sum(it.double_buffered for it in comparisons) >= 20
    assert sum(not it.double_buffered for it in comparisons) >= 20


def test_a_memory_that_another_one_always_exceeds_ends_the_search():
    tiles = random_tiles("w4a16_data_parallel", "l0c", (16, 64, 16), (512, 512, 64), SEED)
    with pytest.raises(ValueError, match="w4a16_data_parallel has 0 tiles near the limit of l0c"):
        next(tiles)


def test_the_confusion_matrix_is_the_one_on_file(comparisons):
    found = json.loads(json.dumps(report(comparisons, SEED)))
    assert found == json.loads(RESULT.read_text(encoding="utf-8"))
