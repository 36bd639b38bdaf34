"""Loading model folders: what loads, in which dtype, and what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import panguq
from panguq.errors import InputError, PanguqError, StorageError
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.models.hf import load_pretrained, load_tokenizer, skeleton
from tests.model_folders import SIZES, make_folder, make_model, with_config

IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama")


def refusal(kind: type[PanguqError], path: Path | str) -> PanguqError:
    with pytest.raises(kind) as caught:
        load_pretrained(path)
    assert caught.value.hint
    return caught.value


def test_the_model_in_the_folder_loads(folder: Path) -> None:
    with torch.no_grad():
        assert torch.equal(load_pretrained(folder)(IDS).logits, make_model()(IDS).logits)


def test_the_dtype_is_the_stored_one_whatever_the_config_says(folder: Path, tmp_path: Path) -> None:
    stored = make_folder(tmp_path / "half", make_model().to(torch.bfloat16))
    said = with_config(stored, tmp_path / "said", dtype="float32")
    assert load_pretrained(said).dtype == torch.bfloat16
    assert skeleton(said).dtype == torch.bfloat16


def test_the_tokenizer_loads(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("a text").input_ids) == "a text"


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    bare = make_folder(tmp_path / "bare", tokenizer=False)
    with pytest.raises(InputError, match="no tokenizer that can be loaded"):
        load_tokenizer(bare)


def test_a_skeleton_has_no_weights_and_can_be_traced(folder: Path) -> None:
    model = skeleton(folder)
    assert all(type(p.data).__name__ == "FakeTensor" for p in model.parameters())
    gm, interface = trace_causal_lm(model)
    assert interface.vocab_size == SIZES["vocab_size"]
    assert len(gm.graph.nodes) > 50


def test_a_skeleton_needs_no_weight_files(folder: Path, tmp_path: Path) -> None:
    bare = with_config(folder, tmp_path / "bare", dtype="bfloat16")
    (bare / "model.safetensors").unlink()
    assert skeleton(bare).dtype == torch.bfloat16


# --- refusals -----------------------------------------------------------------------------------


def test_a_missing_folder() -> None:
    error = refusal(InputError, "meta-llama/Llama-3.2-1B")
    assert "no such folder" in error.message
    assert "local folders only" in error.hint


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    assert "not a folder" in refusal(InputError, folder / "config.json").message


def test_no_config(tmp_path: Path) -> None:
    assert "there is no config.json" in refusal(InputError, tmp_path).message


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "hidden_size": "many"}'])
def test_a_damaged_config(folder: Path, tmp_path: Path, text: str) -> None:
    copy = with_config(folder, tmp_path / "copy")
    (copy / "config.json").write_text(text)
    assert "config.json" in refusal(StorageError, copy).message


def test_no_weights(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    assert "there are no weights" in refusal(InputError, copy).message


def test_pickled_weights(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    error = refusal(InputError, copy)
    assert "pickle" in error.message
    assert "safetensors" in error.hint


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(folder: Path, tmp_path: Path, size: int) -> None:
    copy = with_config(folder, tmp_path / "copy")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:size])
    error = refusal(StorageError, copy)
    assert "model.safetensors: truncated or damaged" in error.message


def test_a_missing_shard_and_a_truncated_one(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert load_pretrained(tmp_path / "sharded").dtype == torch.float32
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-4])
    assert f"{shards[1].name}: truncated" in refusal(StorageError, tmp_path / "sharded").message
    shards[1].unlink()
    assert f"{shards[1].name}: missing" in refusal(StorageError, tmp_path / "sharded").message


def test_an_index_that_leads_elsewhere(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy")
    index = {"weight_map": {"lm_head.weight": "../llama/model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no weight_map of file names" in refusal(StorageError, copy).message


def test_weights_that_are_not_there_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    deeper = with_config(folder, tmp_path / "deeper", num_hidden_layers=3)
    error = refusal(StorageError, deeper)
    assert "weights are missing: model.layers.2." in error.message


def test_weights_of_another_shape(folder: Path, tmp_path: Path) -> None:
    wider = with_config(folder, tmp_path / "wider", intermediate_size=256)
    assert "do not fit config.json" in refusal(StorageError, wider).message


@pytest.mark.parametrize(
    "changed",
    [
        dict(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        dict(architectures=["LlamaForSomethingElse"]),
        dict(architectures=["LlamaRMSNorm"]),
        dict(architectures=["BertForMaskedLM"]),
    ],
)
def test_other_kinds_of_model(folder: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    copy = with_config(folder, tmp_path / "copy", **changed)
    assert changed["architectures"][0] in refusal(InputError, copy).message


def test_a_model_that_is_not_causal(folder: Path, tmp_path: Path) -> None:
    """It loads, and its compile is one that attends both ways (tests/test_encoder.py)."""
    copy = with_config(folder, tmp_path / "copy", is_causal=False)
    assert load_pretrained(copy).config.is_causal is False


def test_a_model_that_needs_its_own_code_is_refused_and_nothing_runs(
    folder: Path, tmp_path: Path
) -> None:
    copy = with_config(
        folder, tmp_path / "copy", model_type="mine", auto_map={"AutoConfig": "mine.Config"}
    )
    (copy / "mine.py").write_text("raise SystemExit('this ran')")
    error = refusal(InputError, copy)
    assert "unknown model type 'mine'; it needs code of its own, which is not run" in error.message


def test_a_quantized_checkpoint(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy", quantization_config={"quant_method": "gptq"})
    assert "quantized already" in refusal(InputError, copy).message


# --- the public names ---------------------------------------------------------------------------


def test_public_names_mean_the_functions_whatever_was_imported_before() -> None:
    import importlib

    for module in ("panguq.evaluation", "panguq.planning.dry_run", "panguq.builtin_recipes"):
        importlib.import_module(module)
    assert callable(panguq.evaluate)
    assert callable(panguq.plan)
    assert "w8a8" in panguq.recipes()
    assert panguq.__version__.count(".") == 2
    for name in panguq.__all__:
        assert getattr(panguq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'complie'"):
        panguq.complie  # noqa: B018
