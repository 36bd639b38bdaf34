"""Every kernel at every legal tile goes through triton-ascend and AscendNPU IR's memory plan."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from conformance.triton.hivm import (
    SUB_BLOCK,
    VECTOR_BITS,
    split_k_faults,
    vector_instructions,
)
from conformance.triton.linalg import TARGETS, linalg_of
from conformance.triton.npu_compiler import compile_linalg, compiler_path
from conformance.triton.variants import KERNELS, Variant, pointers_of, variant
from panguq.kernels.ascend.own.tiles import legal_tiles

if compiler_path() is None:
    pytest.skip("ascendnpu-ir is not installed: run python -m conformance.triton", True)

OPTIONAL_ARGUMENTS = [
    variant(kernel, tile, dtype=dtype, offset=offset, bias=bias)
    for kernel, tile in (("w4a16_data_parallel", (16, 128, 64)), ("w4a16_split_k", (16, 128, 64)))
    for dtype in ("bf16", "fp16")
    for offset in (True, False)
    for bias in ("float", None)
] + [
    variant(kernel, tile, dtype=dtype, bias=bias, pertoken_scale=per_token)
    for kernel, tile in (("w8a8_data_parallel", (16, 256, 256)), ("w8a8_split_k", (16, 256, 256)))
    for dtype in ("bf16", "fp16", "fp32")
    for bias, per_token in (("float", True), ("float", False), ("int32", False), (None, True))
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_legal_tile_compiles_for_every_target_with_double_buffering(kernel, tmp_path):
    def verdicts(tile):
        at_tile = variant(kernel, tile)
        text = linalg_of(at_tile)
        return {
            (tile, target): compile_linalg(text, target, tmp_path, at_tile.name)
            for target in TARGETS
        }

    with ThreadPoolExecutor(2) as pool:
        results = {
            key: verdict
            for part in pool.map(verdicts, legal_tiles(kernel))
            for key, verdict in part.items()
        }
    assert len(results) == len(legal_tiles(kernel)) * len(TARGETS)
    assert not {key: it for key, it in results.items() if not it.double_buffered}
    if kernel.endswith("split_k"):
        pointers = pointers_of(variant(kernel, legal_tiles(kernel)[0]))
        faults = {key: split_k_faults(it.lowered, pointers) for key, it in results.items()}
        assert not {key: found for key, found in faults.items() if found}


@pytest.mark.parametrize("kernel", KERNELS)
def test_linalg_is_the_same_for_every_target(kernel):
    at_tile = variant(kernel, legal_tiles(kernel)[0])
    assert len({linalg_of(at_tile, target) for target in TARGETS}) == 1


def test_a_split_k_program_whose_steps_are_out_of_order_is_found(tmp_path):
    at_tile = variant("w8a8_split_k", (16, 64, 512))
    pointers = pointers_of(at_tile)
    text = compile_linalg(linalg_of(at_tile), TARGETS[0], tmp_path, "kernel").lowered
    assert split_k_faults(text, pointers) == []
    wait = "hivm.hir.sync_block_wait[<VECTOR>, <PIPE_FIX>, <PIPE_S>]"
    overtaken = text.replace("wait_flag[<PIPE_MTE3>, <PIPE_MTE2>", "wait_flag[<PIPE_S>, <PIPE_V>")
    for broken, said in (
        (text.replace(wait, "hivm.hir.other"), "a flag may be raised before the sums are stored"),
        (overtaken, "flags may be read before the program's own is raised"),
        (text.replace(SUB_BLOCK, ""), "both vector cores"),
    ):
        assert any(said in fault for fault in split_k_faults(broken, pointers)), said


@pytest.mark.parametrize(
    ("dtype", "offset", "most"),
    [("fp16", False, 3.1), ("fp16", True, 3.9), ("bf16", False, 6.1), ("bf16", True, 6.9)],
)
def test_few_vector_instructions_unpack_and_scale(dtype, offset, most, tmp_path):
    """For each vector of 16-bit weights, in a round of the loop over k."""
    tile = (16, 256, 128)
    text = linalg_of(variant("w4a16_data_parallel", tile, dtype=dtype, offset=offset, bias=None))
    lowered = compile_linalg(text, TARGETS[0], tmp_path, "kernel").lowered
    vectors = tile[1] * tile[2] * 16 / VECTOR_BITS
    assert 0 < sum(vector_instructions(lowered).values()) / vectors <= most


@pytest.mark.parametrize("at_tile", OPTIONAL_ARGUMENTS, ids=lambda it: it.name)
def test_with_and_without_optional_arguments(at_tile: Variant, tmp_path):
    verdict = compile_linalg(linalg_of(at_tile), TARGETS[2], tmp_path, "kernel")
    assert verdict.compiles, verdict


def test_a_tile_that_is_too_large_is_refused(tmp_path):
    at_tile = variant("w8a8_split_k", (256, 256, 128))
    verdict = compile_linalg(linalg_of(at_tile), TARGETS[0], tmp_path, "large")
    assert (verdict.compiles, verdict.overflow) == (False, "l0c")
    assert verdict.required == 4 * 256 * 256
