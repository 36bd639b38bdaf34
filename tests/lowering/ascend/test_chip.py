"""A chip is data: tiles, candidates, contracts and costs follow the one that a target has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import panguq
from panguq.errors import LoweringError
from panguq.ir.quant_spec import parse_scheme
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.chips import CHIPS
from panguq.kernels.ascend.own.tiles import legal_tiles, multiples, tile_refusal
from panguq.kernels.ascend.vendor.contracts import violations
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.ops import npu_quant_matmul
from panguq.lowering.ascend.target import targets_of
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.select_kernel import select_kernel
from panguq.lowering.target_files import load_target, save_target
from panguq.lowering.targets import TARGETS, add_chip, find_target

# Half of Atlas A2's L0C, k in longer pieces, matmuls up to 1000 wide, and one part of 8 cores.
SMALL = replace(
    ATLAS_A2,
    name="Atlas made up",
    kind="ascend-small",
    memory={**ATLAS_A2.memory, "l0c": 64 * 1024},
    fractal_k={2.0: 32, 1.0: 64, 0.5: 128},
    largest_dimension=1000,
    vendor_blocks=((64, 128),),
    tiles={**ATLAS_A2.tiles, "w8a8_split_k": ((64, 256, 512), (64, 512, 512))},
    parts={"small1": {**ATLAS_A2.parts["ascend910b4"], "cube_cores": (8, "made up for this test")}},
)


@pytest.fixture
def added() -> Iterator[None]:
    with patch.dict(CHIPS), patch.dict(TARGETS):
        add_chip(SMALL)
        yield


def w8a8(n: int, k: int, m: int | None = None) -> MatmulProblem:
    return MatmulProblem(m, n, k, parse_scheme("W8A8_DYNAMIC"))


def test_tiles_that_exceed_a_memory_are_left_out() -> None:
    name = "w8a8_data_parallel"
    assert (128, 256, 256) in legal_tiles(name)
    small = legal_tiles(name, SMALL)
    assert small == tuple(t for t in legal_tiles(name) if 4 * t[0] * t[1] <= 64 * 1024)
    reason = tile_refusal(name, (128, 256, 256), SMALL)
    assert reason == "tile (128, 256, 256) needs 131072 bytes of L0C, which has 65536"
    assert multiples("w8a8_split_k", SMALL) == (16, 64, 64)


def test_candidates_have_the_chips_tiles_splits_and_sizes() -> None:
    (small,) = targets_of(SMALL)
    found = [c for c in small.candidates(w8a8(512, 4096)) if c.schedule == "split_k"]
    assert {c.tile for c in found} == {(64, 256, 512)}
    assert {c.splits for c in found} == {2, 4, 8}
    (vendor, *_) = small.candidates(w8a8(1001, 512))
    assert vendor.refusal == "n=1001 is more than 1000"
    assert small.largest_n == 1000


def test_a_contract_has_the_chips_limits() -> None:
    x, weight = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(64, 1001, dtype=torch.int8)
    call = (
        npu_quant_matmul,
        (x, weight, torch.ones(1001)),
        {"output_dtype": dtype_number(torch.bfloat16)},
    )
    assert violations(*call) == []
    (broken,) = violations(*call, SMALL)
    assert broken.rule == "n must be at most 1000, not 1001"


def test_a_cost_follows_the_chips_fractal_and_blocks() -> None:
    (small,) = targets_of(SMALL)
    same_numbers = replace(small, chip=ATLAS_A2)
    problem = w8a8(512, 4096, m=512)
    vendor = small.candidates(problem)[0]
    ours, others = small.cost(vendor, problem), same_numbers.cost(vendor, problem)
    assert ours.how.endswith("blocks 64x128") and not others.how.endswith("blocks 64x128")
    assert ours.terms["cube"] == pytest.approx(others.terms["cube"] / 2)  # twice the k in a cycle


def test_a_model_compiles_for_an_added_chip(added, tmp_path) -> None:
    """Its parts are targets, its kind stands in target files, its tiles in the graph."""
    save_target(replace(find_target("small1"), name="mine"), tmp_path / "mine.yaml")
    assert load_target(tmp_path / "mine.yaml").chip is SMALL
    assert select_kernel(w8a8(512, 8192), find_target("small1")).table[0].last_m is not None
    model = torch.nn.Sequential(torch.nn.Linear(512, 1500))
    x = torch.randn(4, 512, dtype=torch.bfloat16)
    compiled = panguq.compile(model, "w8a8-dynamic", example_inputs=(x,), target="small1")
    calls = [n for n in compiled.graph.graph.nodes if "matmul" in str(n.target)]
    assert [n.meta["val"].shape[-1] for n in calls] == [768, 732]  # 1500 outputs, 1000 at most
    assert compiled(x).shape == (4, 1500)


def test_a_kind_that_is_taken(added) -> None:
    with pytest.raises(LoweringError, match="there is a chip 'ascend-small' already"):
        add_chip(SMALL)
