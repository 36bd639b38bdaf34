"""FP8, a number format without kernels: targets refuse it, and `reference` runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import panguq
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.dumps.bisect import bisect
from panguq.dumps.reader import DumpReader
from panguq.dumps.replay import run_stage
from panguq.errors import ExportError, LoweringError, PanguqError, RecipeError, StorageError
from panguq.ir.edit import op_name, weights_of
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.text.serialize import from_text, to_text
from panguq.ir.text.value_types import restore_types
from panguq.ir.views import DequantizedWeight, Linear
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.targets import TARGETS, find_target
from tests.model_shelf import OneLinear, make_model, token_ids

RECIPE = "w8a8-fp8"
KERNEL_TARGETS = [name for name in TARGETS if name != "reference"]
IDS = token_ids(1, 9)
CALIBRATED = ["calibrate", "insert-fake-quant", "quantize-weights"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model("llama")


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8") / "dump"


@pytest.fixture(scope="module")
def compiled(model: nn.Module, dump: Path) -> CompiledCausalLM:
    return panguq.compile(model, RECIPE, target="reference", dtype=torch.bfloat16, dump_dir=dump)


# --- targets with kernels -----------------------------------------------------------------------


@pytest.mark.parametrize("target", KERNEL_TARGETS)
def test_a_target_without_kernels_for_it_refuses_it_first_of_all(target: str) -> None:
    message = rf"target {target} has no kernel for float8_e4m3fn, the number format of W8A8_FP8"
    with pytest.raises(LoweringError, match=message) as caught:
        panguq.compile(nn.Linear(2, 2), RECIPE, calibration="no such file", target=target)
    assert "compile for the target reference" in caught.value.hint


def test_a_choice_of_a_pass_is_refused_as_well() -> None:
    choose = {"mixed-precision": {"choices": ["W4A16", "W8A8_FP8"], "bits": 7.0}}
    recipe = {"schemes": {"*": "W4A16"}, "passes": [*CALIBRATED[:1], choose, *CALIBRATED[1:]]}
    with pytest.raises(LoweringError, match="has no kernel for float8_e4m3fn"):
        panguq.compile(nn.Linear(2, 2), recipe)


@pytest.mark.parametrize("target", ["cpu", "ascend910b1"])
def test_the_dry_run_says_so_once(model: nn.Module, target: str) -> None:
    plan = panguq.plan(model, RECIPE, target=target)
    (refusal,) = plan.refusals
    assert "no kernel for float8_e4m3fn" in refusal and "target reference" in refusal
    rows = [row for row in plan.matmuls if not row.gives_logits]
    assert {row.scheme for row in rows} == {"W8A8_FP8"}
    assert all("no kernel reads float8_e4m3fn" in row.note for row in rows)


@pytest.mark.parametrize("side", ["weight", "activation", "both"])
@pytest.mark.parametrize("target", ["cpu", "ascend910b1"])
def test_no_kernel_of_integers_takes_it_for_integers(target: str, side: str) -> None:
    fp8, int8 = SCHEMES["W8A8_FP8"], SCHEMES["W8A8_DYNAMIC"]
    mixed = replace(fp8, weight=int8.weight), replace(fp8, activation=int8.activation)
    scheme = {"weight": mixed[1], "activation": mixed[0], "both": fp8}[side]
    machine = find_target(target)
    found = machine.candidates(MatmulProblem(1, 512, 512, scheme), allow_float=True)
    assert [(c.kernel, c.refusal) for c in found] == [("none", "no kernel reads float8_e4m3fn")]
    assert machine.fallbacks(scheme) == ()


# --- passes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learned-rounding", "progressive-rounding", "slim-llm", "billm"])
def test_passes_that_count_in_integers_refuse_it_before_any_data(name: str) -> None:
    recipe = {"schemes": {"*": "W8A8_FP8"}, "passes": ["calibrate", "insert-fake-quant", name]}
    with pytest.raises(RecipeError, match=f"{name} chooses among integers, and W8A8_FP8 has"):
        panguq.compile(nn.Linear(2, 2), recipe, calibration="no such file", target="reference")


SOLVERS = (["quantize-weights"], [{"quantize-weights": {"clip_search": True}}], ["gptq"],
           ["gptaq"], ["quantize-weights", "tune-scales"])  # fmt: skip


@pytest.mark.parametrize("passes", [*SOLVERS, ["awq", "quantize-weights"]], ids=str)
def test_all_others_choose_values_of_its_grid(passes: list[str]) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    scaling = [name for name in passes if name == "awq"]
    rest = [name for name in passes if name != "awq"]
    recipe = {
        "schemes": {"*": "W8A8_FP8"},
        "passes": ["calibrate", *scaling, "insert-fake-quant", *rest],
    }
    module = OneLinear(32, 16)
    made = panguq.compile(
        module, recipe, example_inputs=(x[:4],), calibration=[x], target="reference"
    )
    noise = (made(x) - module(x)).square().mean() / module(x).square().mean()
    assert 20 < -10 * noise.log10() < 40  # three bits of mantissa
    (linear,) = [n for n in made.graph.graph.nodes if Linear.match(n) is not None]
    weight = DequantizedWeight.of(Linear.of(linear).weight)
    assert weight.codes.meta["val"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - {"W1A16"}))
def test_reference_takes_every_scheme(name: str) -> None:
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    recipe = {"schemes": {"*": name}, "passes": CALIBRATED}
    made = panguq.compile(
        OneLinear(256, 16), recipe, example_inputs=(x,), calibration=[x], target="reference"
    )
    assert torch.equal(made(x), made.at_stage("fake-quant")(x))
    assert made.report.matmuls[0].scheme == name


def test_a_budget_of_time_needs_a_target_with_kernels() -> None:
    choose = {"mixed-precision": {"choices": ["W8A8_FP8"], "relative_time": 0.5}}
    recipe = {"schemes": {"*": "W8A8_FP8"}, "passes": [*CALIBRATED[:1], choose, *CALIBRATED[1:]]}
    x = torch.randn(8, 32)
    with pytest.raises(RecipeError, match="relative_time needs a target to predict for"):
        panguq.compile(OneLinear(32, 16), recipe, example_inputs=(x,), target="reference")


# --- what is made -------------------------------------------------------------------------------


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_it_is_close_to_the_float_model(compiled: CompiledCausalLM, model: nn.Module) -> None:
    assert compiled.report.end_to_end.sqnr_db > 15
    assert (logits(compiled).argmax(-1) == logits(model).argmax(-1)).float().mean() > 0.5


def test_the_report_counts_a_byte_a_weight_and_a_scale_an_output(
    compiled: CompiledCausalLM,
) -> None:
    rows = [row for row in compiled.report.matmuls if row.scheme == "W8A8_FP8"]
    assert len(rows) == 14
    assert all(row.stored_bytes == row.n * row.k + 4 * row.n for row in rows)


def test_it_is_saved_as_8_bit_floats_and_loaded(compiled: CompiledCausalLM, tmp_path: Path) -> None:
    compiled.save(tmp_path / "model")
    with safe_open(str(tmp_path / "model/weights.safetensors"), framework="pt") as file:
        codes = [name for name in file.keys() if name.endswith("_codes")]  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in codes} == {"F8_E4M3"}
    assert len(codes) == 14
    loaded = panguq.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(compiled))
    generated = loaded.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, compiled.generate(IDS, max_new_tokens=3, do_sample=False))


def test_a_saved_graph_names_a_format_that_there_is(compiled: CompiledCausalLM) -> None:
    text = to_text(compiled.graph)
    assert '"float8_e4m3fn"' in text
    damaged = from_text(text.replace('"float8_e4m3fn"', '"float9"'), weights_of(compiled.graph))
    with pytest.raises(StorageError, match="unknown number format 'float9'"):
        restore_types(damaged, compiled.interface)


def test_its_dump_runs_again(compiled: CompiledCausalLM, dump: Path) -> None:
    reader = DumpReader(dump)
    assert reader.stages[-1] == "04_quantize-weights"
    assert run_stage(reader).kl == pytest.approx(run_stage(reader, "03").kl)
    assert bisect(reader, 15.0).clean


@pytest.mark.parametrize("form", ["compressed-tensors", "ascend"])
def test_checkpoints_for_servers_refuse_it(
    compiled: CompiledCausalLM, tmp_path: Path, form: str
) -> None:
    with pytest.raises(ExportError, match="panguq writes no codes of float8_e4m3fn for it"):
        compiled.save(tmp_path / "model", format=form)
    assert not (tmp_path / "model").exists()


def test_onnx_refuses_it(compiled: CompiledCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"does not know the op panguq\.encode_per_token"):
        compiled.export_onnx(tmp_path / "model.onnx")


def test_it_moves_nowhere(compiled: CompiledCausalLM) -> None:
    with pytest.raises(PanguqError, match="compiled for reference does not run on npu"):
        compiled.to("npu")
    assert not any(op_name(node) == "int8_linear" for node in compiled.graph.graph.nodes)
