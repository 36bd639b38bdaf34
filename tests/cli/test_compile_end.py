"""What the end of a compile would refuse is refused before anything is traced or calibrated."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import panguq
from panguq.cli import main
from panguq.errors import ExportError, StorageError
from panguq.planning import disk_forecast
from panguq.planning.disk_forecast import check_disk, forecast_bytes
from panguq.planning.format_check import check_format
from panguq.recipe import Recipe
from tests.model_folders import make_folder
from tests.model_shelf import shared_model, token_ids
from tests.shared_traces import shared_traces


@pytest.fixture(autouse=True, scope="module")
def one_trace_a_model() -> Iterator[None]:
    with shared_traces():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("end") / "model")


def refusal(format: str, recipe: Any, family: str = "llama", **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        check_format(format, shared_model(family), Recipe.of(recipe), **options)
    return caught.value.message


BFLOAT16 = dict(dtype=torch.bfloat16)
KV8 = {"schemes": {"*": "W8A8"}, "passes": ["quantize-kv-cache"]}
MIXED = {
    "schemes": {"*": "W8A16"},
    "passes": [{"mixed-precision": {"bits": 5, "choices": ["W4A16", "W6A16"]}}],
}


@pytest.mark.parametrize(
    ("format", "recipe", "options", "why"),
    [
        ("ascend", "w8a8", {}, "computes in float32"),
        ("ascend", "w4a16", BFLOAT16, "no server of this format takes the model"),
        ("ascend", "w4a8", BFLOAT16, "wants k % 256 == 0"),
        ("ascend", "w8a16", dict(target="ascend910b1", dtype=torch.float32), "float32"),
        ("gptq", "w8a8", {}, "integer weights alone, for inputs in float"),
        ("awq", "w8a16", {}, "codes of 4 bits alone"),
        ("compressed-tensors", "w3a16", {}, "no loader takes this model"),
        ("compressed-tensors", "float", {}, "nothing in this model is quantized"),
        ("compressed-tensors", "w8a16", dict(family="gpt2"), "is a Conv1D"),
        ("compressed-tensors", KV8, {}, "KV cache"),
        ("ascend", MIXED, BFLOAT16, "no server of this format takes the model"),
    ],
)
def test_what_a_format_cannot_hold(format: str, recipe: Any, options: Any, why: str) -> None:
    assert why in refusal(format, recipe, **options)


def test_the_words_are_those_of_saving(tmp_path: Path) -> None:
    model = panguq.compile(shared_model("llama"), "w4a16", calibration=token_ids(2, 8), **BFLOAT16)
    with pytest.raises(ExportError) as caught:
        model.save(tmp_path / "out", format="ascend")
    assert caught.value.message == refusal("ascend", "w4a16", **BFLOAT16)


MIXED_EXPERTS = {
    "schemes": {"*": "W8A8_DYNAMIC", "*.experts.down_proj": "FLOAT"},
    "passes": ["insert-fake-quant", "quantize-weights"],
}


def test_a_layers_experts_of_several_schemes_are_refused_in_the_words_of_saving(
    tmp_path: Path,
) -> None:
    model = panguq.compile(shared_model("qwen3_moe"), MIXED_EXPERTS, **BFLOAT16)
    with pytest.raises(ExportError, match="its experts have several types") as caught:
        model.save(tmp_path / "out", format="ascend")
    said = refusal("ascend", MIXED_EXPERTS, "qwen3_moe", **BFLOAT16)
    assert said == caught.value.message
    recipe = Recipe.of(MIXED_EXPERTS)
    _, warnings = check_format("compressed-tensors", shared_model("qwen3_moe"), recipe)
    (warning,) = [text for text in warnings if "experts" in text]
    assert warning.startswith("vllm and vllm-ascend will not load this checkpoint")


def test_a_dry_run_says_what_the_format_and_the_server_refuse(tmp_path: Path, capsys: Any) -> None:
    folder = make_folder(tmp_path / "mixture", shared_model("qwen3_moe"))
    command = ["compile", str(folder), "--recipe", "w8a8-dynamic", "--dtype", "bfloat16"]
    command += ["--scheme", "*.experts.down_proj=FLOAT", "--dry-run", "--format", "ascend"]
    assert main([*command, "--for", "vllm-ascend"]) == 1
    said = capsys.readouterr().out
    assert "--format ascend refuses the model: model.layers.0.mlp.experts: its experts" in said
    assert "(FLOAT, W8A8_DYNAMIC): the experts of one layer have several schemes" in said


@pytest.mark.parametrize(
    ("format", "recipe"),
    [("compressed-tensors", "w4a16"), ("ascend", "w8a8-serving"), ("panguq", "w2a16")],
)
def test_what_it_can_hold_passes(format: str, recipe: str) -> None:
    check_format(format, shared_model("llama"), Recipe.of(recipe), **BFLOAT16)


def test_a_choice_that_the_format_takes_may_be_made() -> None:
    mixed = {**MIXED, "passes": [{"mixed-precision": {"bits": 5, "choices": ["W4A16", "W8A16"]}}]}
    check_format("compressed-tensors", shared_model("llama"), Recipe.of(mixed))


def test_a_reader_that_will_not_take_it_and_a_split_are_warned_of() -> None:
    _, warnings = check_format("compressed-tensors", shared_model("llama"), Recipe.of("w8a8"))
    assert any(text.startswith("vllm-ascend will not load") for text in warnings)
    assert any("split off" in text for text in warnings)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--format", "ascend"], "float32"),
        (["--format", "ascend", "--dtype", "bfloat16"], "no server of this format"),
        (["--format", "compressed-tensors", "--for", "vllm-ascend"], "vllm-ascend"),
        (["--format", "panguq", "--for", "vllm"], "does not read"),
        (["--format", "ascend", "--for", "vllm"], "does not read"),
    ],
)
def test_the_command_refuses_before_any_work(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, options: list[str], why: str
) -> None:
    monkeypatch.setattr("panguq.compiler.compile", lambda *_, **__: pytest.fail("it began"))
    out = ["--out", str(tmp_path / "out")]
    assert main(["compile", str(folder), "--recipe", "w4a16", *out, *options]) == 1
    assert why in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- disk ---------------------------------------------------------------------------------------


def test_a_full_disk_is_foreseen(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.setattr("panguq.compiler.compile", lambda *_, **__: pytest.fail("it began"))
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(disk_forecast.shutil, "disk_usage", lambda _: usage)
    out = tmp_path / "out"
    assert main(["compile", str(folder), "--recipe", "w4a16", "--out", str(out)]) == 1
    assert "not enough space: the compile will write at least 0." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", "w4a16"), ("qwen2", "w8a16"), ("gpt2", "w2a16"), ("qwen3_moe", "w4a16")],
)
def test_a_forecast_is_below_what_is_saved_and_near(tmp_path: Path, recipe: str, family: str):
    """gpt2 and qwen2 have tied heads, gpt2 no linears but the head."""
    model = shared_model(family)
    compiled = panguq.compile(model, recipe, calibration=token_ids(2, 8))
    compiled.save(tmp_path / "out")
    saved = sum(file.stat().st_size for file in (tmp_path / "out").glob("weights*"))
    codes, others = forecast_bytes(model, Recipe.of(recipe))
    assert 0.6 * saved < codes + others < saved


def test_a_cast_and_the_widths_of_choices_count() -> None:
    module = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    recipe = Recipe.of({"schemes": {"0": "W8A16"}, "passes": []})
    assert forecast_bytes(module, recipe, torch.bfloat16) == (256 * 256 + 512, 2 * 256 * 256)
    mixed = Recipe.of({"schemes": {"*": "W8A16"}, "passes": [{"mixed-precision": {"bits": 5}}]})
    assert forecast_bytes(module, mixed)[0] == 256 * 256 + 2 * 512


def test_places_on_one_disk_are_added(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a").mkdir()
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 30)
    monkeypatch.setattr(disk_forecast.shutil, "disk_usage", lambda _: usage)
    check_disk({tmp_path: 2 << 30, tmp_path / "a": 1 << 30})
    with pytest.raises(StorageError, match=r"at least 4\.00 GiB there, and 3\.00 GiB are free"):
        check_disk({tmp_path: 2 << 30, tmp_path / "a": 2 << 30})
