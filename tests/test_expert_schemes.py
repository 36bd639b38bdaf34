"""Experts of one layer with schemes that differ: expert 3 in 8 bits, 1 in float, the rest in 4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import panguq
from panguq.artifact import LOWERED
from panguq.check.report import check_folder
from panguq.data.inputs import prepare
from panguq.errors import ExportError, LoweringError, RecipeError
from panguq.formats.onnx.export import export_onnx
from panguq.formats.onnx.run import OnnxModel
from panguq.ir.edit import module_path
from panguq.ir.node_meta import meta_of
from panguq.ir.views import ExpertLinear
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.mixed_precision import MixedPrecision
from panguq.passes.pipeline.base import matmuls
from tests.formats.onnx.test_export import assert_close
from tests.model_shelf import EXPERTS, canonical, family_context, shared_model, token_ids
from tests.shared_traces import shared_traces

LAYER = "model.layers.1.mlp.experts."
SCHEMES = {"*": "W4A16-g32", "*.experts.3.*": "W8A16", f"{LAYER}1.*": "FLOAT"}
EACH = ["W4A16-g32", "FLOAT", "W4A16-g32", "W8A16", "W4A16-g32", "W4A16-g32"]


@pytest.fixture(autouse=True, scope="module")
def one_trace() -> Iterator[None]:
    with shared_traces():
        yield


def compiled_with(schemes: dict[str, str], *passes: Any, **options: Any) -> Any:
    recipe = {"name": "by-expert", "schemes": schemes, "passes": ["insert-fake-quant", *passes]}
    return panguq.compile(shared_model(EXPERTS), recipe, calibration=token_ids(4, 16), **options)


@pytest.fixture(scope="module")
def mixed(one_trace: None) -> Any:
    return compiled_with(SCHEMES, {"gptq": {"least_tokens": 30}})


def test_each_scheme_is_a_matmul_of_its_experts(mixed: Any, tmp_path: Path) -> None:
    rows = {row.name: row for row in mixed.report.matmuls}
    of_layer = [rows[f"{LAYER}{e}.down_proj:linear"] for e in range(6)]
    assert [row.scheme for row in of_layer] == EACH
    assert [row.kernel.rpartition(".")[2] for row in of_layer][1:4] == [
        "expert_linear", "expert_int4_linear", "expert_int8_weight_linear",
    ]  # fmt: skip
    assert sum(row.tokens for row in of_layer) == 2 * 4 * 16
    assert {row.on_all_tokens for row in of_layer} == {True, False}
    assert len({row.local_sqnr_db for row in of_layer}) == 1  # that of all together
    ids = token_ids(1, 16)
    mixed.save(tmp_path / "own")
    assert torch.equal(panguq.load(tmp_path / "own")(ids).logits, mixed(ids).logits)


def test_an_expert_has_the_codes_that_it_has_where_all_have_its_scheme(mixed: Any) -> None:
    """Layer 0: nothing in front of it is quantized otherwise, so that its inputs are the same."""
    one = {"*": "W4A16-g32", "model.layers.0.mlp.experts.*": "W8A16"}
    alone = compiled_with(one, {"gptq": {"least_tokens": 30}}).state_dict()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    own = mixed.state_dict()[f"{name}_W8A16_codes"]
    assert torch.equal(own[0], alone[f"{name}_codes"][3])


def test_calibrated_scales_are_each_experts_own() -> None:
    """A clip search weighs errors by what the expert itself meets."""
    search = {"quantize-weights": {"clip_search": True}}
    recipe = {"name": "search", "passes": ["calibrate", "insert-fake-quant", search]}
    given = token_ids(4, 16)
    found, alone = (
        panguq.compile(shared_model(EXPERTS), {**recipe, "schemes": schemes}, calibration=given)
        for schemes in ({"*": "W4A16-g32", "*.experts.3.*": "W8A16"}, {"*": "W8A16"})
    )
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = alone.state_dict()[f"{name}_scale"]
    assert torch.equal(found.state_dict()[f"{name}_W8A16_scale"][0], whole[3])


@pytest.mark.parametrize("stage", ["fake-quant", LOWERED])
def test_onnx_has_the_same_numbers(mixed: Any, stage: str, tmp_path: Path) -> None:
    export_onnx(mixed.artifact, tmp_path / "model.onnx", stage)
    found = OnnxModel(tmp_path / "model.onnx", mixed.interface)
    assert_close(mixed, stage, found, prepare(mixed.interface, token_ids(2, 9)))


def test_mixed_precision_gives_each_expert_its_own_bits() -> None:
    gm, _ = canonical(EXPERTS)
    ctx = family_context(EXPERTS, sequences=2, tokens=12)
    AssignSchemes(schemes=(("*", "W4A16-g32"),)).run(gm, ctx)
    choices = ("W4A16-g32", "W6A16-g32", "W8A16")
    result = MixedPrecision(choices=choices, bits=6.2, by_expert=True).run(gm, ctx)
    nodes = [n for n in matmuls(gm) if ExpertLinear.match(n) is not None]
    each = {module_path(n): meta_of(n).expert_schemes for n in nodes}
    first = LAYER.replace("1", "0")
    assert each[first + "down_proj"] == each[first + "gate_up_proj"] != ()
    loss = torch.zeros(6)
    for row in result.tables["experts"].rows:
        loss[row[1]] += float(row[2]) * row[0].startswith(first)
    bits = [scheme.weight.bits for scheme in each[first + "down_proj"]]
    assert bits[int(loss.argmin())] == min(bits) < max(bits) == bits[int(loss.argmax())]
    (budget,) = result.tables["budgets"].rows
    assert 6.0 < float(budget[2]) <= 6.2
    rows = [row for row in result.tables["allocation"].rows if first in row[0]]
    assert {row[4]: row[3] for row in rows} == Counter(s.name for s in each[first + "down_proj"])


# --- what is refused ----------------------------------------------------------------------------


def test_inputs_that_are_quantized_in_several_ways_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"1\.mlp\.experts\.\w+ have schemes that quantize their"):
        compiled_with({"*": "W4A16-g32", f"{LAYER}2.*": "W8A8_DYNAMIC"}, "quantize-weights")
    with pytest.raises(RecipeError, match="by_expert with choices"):
        MixedPrecision(choices=("W4A16", "W8A8_DYNAMIC"), bits=6.0, by_expert=True)


def test_a_glob_of_an_expert_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match="matches no matmul"):
        compiled_with({"*": "W4A16-g32", "*.experts.6.*": "W8A16"}, "quantize-weights")


def test_a_target_without_such_a_kernel_says_so_before_any_data_is_read() -> None:
    recipe = {"schemes": {"*": "W4A16-g32", "*.experts.3.*": "W8A16"}, "passes": []}
    said = "no kernel for a matmul whose experts have several schemes"
    plan = panguq.plan(shared_model(EXPERTS), recipe, target="ascend910b1")
    assert sum(said in refusal for refusal in plan.refusals) == 4  # two matmuls of two layers
    choose = {"mixed-precision": {"bits": 6.0, "by_expert": True}}
    chosen = {"schemes": {"*": "W4A16"}, "passes": [choose, "insert-fake-quant", "gptq"]}
    with pytest.raises(LoweringError, match=f"{said}, which mixed-precision may give them"):
        panguq.compile(shared_model(EXPERTS), chosen, target="ascend910b1")


def test_servers_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schemes = {"*": "W8A16", "*.experts.3.*": "W4A16-g32"}
    found = compiled_with(schemes, "quantize-weights", dtype=torch.bfloat16)
    with pytest.raises(ExportError, match="its experts have several types"):
        found.save(tmp_path / "ascend", format="ascend")
    found.save(tmp_path / "ct", format="compressed-tensors")
    assert "the experts of model.layers.0.mlp.experts have several schemes" in caplog.text
    assert {f.rule for f in check_folder(tmp_path / "ct").findings} == {
        "no-scheme", "no-tokenizer",
    }  # fmt: skip
    caplog.clear()
    found.save(tmp_path / "gptq", format="gptq")
    assert "model.layers.0.mlp.experts has experts' weights of several kinds" in caplog.text
    with_float = compiled_with({"*": "W8A16", "*.experts.3.*": "FLOAT"}, "quantize-weights")
    with pytest.raises(ExportError, match="some of its experts stay float and others do not"):
        with_float.save(tmp_path / "float", format="compressed-tensors")
