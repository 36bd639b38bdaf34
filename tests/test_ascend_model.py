"""A model compiled for Ascend: called, saved, specialized and refused like any other, on a CPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch

import panguq
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.errors import InputError, LoweringError, RecipeError
from panguq.explain.graph_ops import compiled_times, render
from panguq.ir.edit import op_name
from panguq.lowering.target_files import save_target
from panguq.lowering.targets import find_target
from tests.model_shelf import shared_model, token_ids
from tests.shared_traces import shared_traces


@pytest.fixture(autouse=True, scope="module")
def one_trace_a_model() -> Iterator[None]:
    with shared_traces():
        yield


@functools.cache
def compiled(recipe: str, target: str = "ascend910b1") -> CompiledCausalLM:
    model = panguq.compile(
        shared_model("openpangu"), recipe, calibration=token_ids(4, 32), target=target
    )
    assert isinstance(model, CompiledCausalLM)
    return model


def ops(model: CompiledCausalLM) -> set[str]:
    return {op_name(n) for n in model.graph.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w8a16", "w4a16", "w4a8", "float"])
def test_every_recipe_runs_in_bfloat16(recipe) -> None:
    model, ids = compiled(recipe), token_ids(2, 9, seed=3)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        expected = shared_model("openpangu")(ids).logits
    noise = (model(ids).logits.float() - expected).square().sum()
    assert 10 * torch.log10(expected.square().sum() / noise) >= (8 if recipe[1] == "4" else 20)
    assert {"npu_add_rms_norm", "npu_swiglu", "npu_fused_infer_attention_score"} <= ops(model)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w8a16", "w4a16", "w4a8", "float"])
def test_every_op_of_a_graph_has_a_price(recipe) -> None:
    found = compiled_times(compiled(recipe), find_target("ascend910b2"), batch=2, prompt=64)
    for phase in (found["prompt"], found["decode"]):
        assert not phase.unpriced, set(phase.unpriced.values())
        kernels = {op_name(n).partition(".")[0] for n in phase.costs}
        assert {"npu_add_rms_norm", "npu_swiglu", "npu_fused_infer_attention_score"} <= kernels
        assert not {"reshape", "npu_format_cast"} & kernels  # no kernels of a step
    text = render(found, "ascend910b2")
    assert "2 x 1 tokens behind 64 of the past" in text and "npu_add_rms_norm" in text


def test_prompt_and_steps_give_what_the_whole_gives() -> None:
    model, ids = compiled("w8a8"), token_ids(1, 12, seed=4)
    whole = model(ids).logits
    first = model(ids[:, :11])
    last = model(ids[:, 11:], past_key_values=first.past_key_values).logits
    assert torch.allclose(last[:, -1].float(), whole[:, -1].float(), atol=0.1, rtol=0.1)


def test_save_and_load_give_the_same_bits(tmp_path) -> None:
    model, ids = compiled("w4a16"), token_ids(2, 9)
    model.save(tmp_path / "out")
    loaded = panguq.load(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.target == "ascend910b1"


def test_specialized_models_generate_the_same_tokens() -> None:
    model, ids = compiled("w8a8-dynamic"), token_ids(1, 6)
    options = {"max_new_tokens": 4, "do_sample": False}
    special = model.specialize(m=1)
    assert "dispatch_matmul" not in ops(special)
    assert torch.equal(special.generate(ids, **options), model.generate(ids, **options))


def test_a_target_file_is_a_target(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    save_target(dataclasses.replace(find_target("ascend910b3"), name="mine"), path)
    assert compiled("w8a8", str(path)).target == str(path)


def test_weight_formats_by_recipe() -> None:
    recipe = dict(panguq.Recipe.named("w8a8-dynamic"))
    for wanted, found in (("NZ", True), ("ND", False)):
        given = panguq.Recipe.of({**recipe, "ascend": {"weight_format": wanted}})
        model = panguq.compile(
            shared_model("openpangu"), given, calibration=token_ids(2, 16), target="ascend910b1"
        )
        assert ("npu_format_cast" in ops(model)) == found


@pytest.mark.parametrize(
    ("ascend", "message"),
    [
        ({"weight_formt": "NZ"}, "unknown option 'weight_formt'"),
        ({"weight_format": "nz"}, "weight_format = 'nz'"),
        ({"tokens": {"decode": [0]}}, "tokens"),
        ({"allow_float": "yes"}, "allow_float = 'yes'"),
    ],
)
def test_options_that_mean_nothing(ascend, message) -> None:
    with pytest.raises(RecipeError, match=message):
        panguq.Recipe.of({"schemes": {"*": "W8A8_DYNAMIC"}, "ascend": ascend})


def test_devices_that_a_model_cannot_run_on() -> None:
    with pytest.raises(InputError, match="do not run on cuda"):
        compiled("w8a8").to("cuda")
    cpu = panguq.compile(shared_model("openpangu"), "float")
    with pytest.raises(InputError, match="compiled for cpu does not run on npu"):
        cpu.to("npu")
    assert compiled("w8a8").to("cpu") is compiled("w8a8")


def test_an_npu_that_is_not_there() -> None:
    with pytest.raises(LoweringError, match="torch_npu"):
        compiled("w8a8").to("npu")


def test_an_unknown_format_of_a_folder(tmp_path) -> None:
    with pytest.raises(InputError, match="unknown format 'gguf'"):
        compiled("w8a8").save(tmp_path / "x", format="gguf")
