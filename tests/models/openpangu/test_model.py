"""openPangu's folders load without their code, as the model that was published."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import panguq
from panguq.errors import InputError, StorageError
from panguq.models.hf import load_pretrained, skeleton
from panguq.models.openpangu.config import as_llama
from tests import openpangu_reference
from tests.openpangu_folders import (
    CONFIG,
    SIZES_1B,
    SIZES_7B,
    make_openpangu,
    make_weights,
    write_json,
    write_shards,
)

IDS = torch.arange(3, 40)


def same_logits(folder: Path, **changed: Any) -> None:
    """The loaded model's logits are the reference's, to float32 rounding.

    The bound is a float64 run of the same formulas: 4 times float32's own distance to it.
    """
    config = CONFIG | changed
    weights = make_weights(config)
    exact = {name: tensor.double() for name, tensor in weights.items()}
    wanted = openpangu_reference.logits(exact, config, IDS)
    rounding = (openpangu_reference.logits(weights, config, IDS) - wanted).abs().max()
    with torch.no_grad():
        found = load_pretrained(folder)(IDS[None]).logits[0]
    assert found.dtype == torch.float32
    assert 0 < rounding < 1e-4
    assert (found - wanted).abs().max() <= 4 * rounding


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loaded_model_is_the_published_one(tmp_path: Path, shards: int, tied: bool) -> None:
    changed = {"tie_word_embeddings": tied}
    same_logits(make_openpangu(tmp_path / "pangu", shards, **changed), **changed)


def test_so_is_one_with_the_1bs_theta(tmp_path: Path) -> None:
    changed = {"rope_theta": 4e6, "num_key_value_heads": 4}
    same_logits(make_openpangu(tmp_path / "pangu", **changed), **changed)


def test_every_bias_and_every_detail_counts(tmp_path: Path) -> None:
    """What `same_logits` would miss, if these changed nothing."""
    folder = make_openpangu(tmp_path / "pangu")
    weights = make_weights(CONFIG)
    base = openpangu_reference.logits(weights, CONFIG, IDS)
    for name in "qvo":
        key = f"model.layers.1.self_attn.{name}_proj.bias"
        other = weights | {key: torch.zeros_like(weights[key])}
        assert (openpangu_reference.logits(other, CONFIG, IDS) - base).abs().max() > 1e-2
    other = CONFIG | {"rope_theta": 4e6}
    assert (openpangu_reference.logits(weights, other, IDS) - base).abs().max() > 1e-2
    assert load_pretrained(folder).config.rope_parameters["rope_theta"] == 16e6


def test_the_weights_stay_memory_mapped(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux")
    model = load_pretrained(make_openpangu(tmp_path / "pangu", shards=2))
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in maps.read_text().splitlines()
        if re.search(rf"{re.escape(str(tmp_path))}.*\.safetensors", line)
    ]
    for name, weight in model.named_parameters():
        assert any(low <= weight.data_ptr() < high for low, high in ranges), name


def test_it_compiles_and_the_float_compile_is_the_same_model(tmp_path: Path) -> None:
    folder = make_openpangu(tmp_path / "pangu")
    model = load_pretrained(folder)
    compiled = panguq.compile(model, "float", calibration=IDS[None])
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS[None]).logits, model(IDS[None]).logits)
    assert compiled.generation_config.eos_token_id == CONFIG["eos_token_id"]


# --- the config ---------------------------------------------------------------------------------


def test_no_code_of_the_folder_runs_and_the_class_is_llama(tmp_path: Path) -> None:
    model = load_pretrained(make_openpangu(tmp_path / "pangu"))
    assert type(model) is transformers.LlamaForCausalLM
    assert model.model.layers[0].self_attn.o_proj.bias is not None
    assert model.model.layers[0].mlp.up_proj.bias is None


def test_a_silent_config_means_what_the_published_class_assumes() -> None:
    found = as_llama({"model_type": "PanguEmbedded", "rope_theta": None})
    published = CONFIG | SIZES_7B
    for key, value in found.items():
        if key not in ("model_type", "architectures", "attention_bias", "mlp_bias"):
            assert value == published[key], key
    assert found["attention_bias"] is True


def test_the_7bs_sizes_are_those_of_its_index(tmp_path: Path) -> None:
    """Its model.safetensors.index.json gives 16,061,784,576 bytes, rotary frequencies included."""
    write_json(tmp_path / "config.json", CONFIG | SIZES_7B)
    model = skeleton(tmp_path)
    assert model.dtype == torch.bfloat16
    frequencies = 34 * 64 * 4
    assert sum(p.nbytes for p in model.parameters()) + frequencies == 16_061_784_576


def test_the_1b_has_as_many_tensors_as_its_gguf_file(tmp_path: Path) -> None:
    """The published GGUF file of the 1B lists 340 tensors and no output.weight: it is tied."""
    write_json(tmp_path / "config.json", CONFIG | SIZES_1B)
    assert len(list(skeleton(tmp_path).parameters())) == 340


def test_a_skeleton_needs_no_shards_even_if_the_index_is_there(tmp_path: Path) -> None:
    folder = make_openpangu(tmp_path / "pangu", shards=3, torch_dtype="bfloat16")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert skeleton(folder).dtype == torch.bfloat16
    assert "model-00001-of-00003.safetensors: missing, but" in refused(StorageError, folder)


# --- what does not fit --------------------------------------------------------------------------


def refused(kind: type[panguq.PanguqError], folder: Path) -> str:
    with pytest.raises(kind) as caught:
        load_pretrained(folder)
    assert caught.value.hint
    return caught.value.message


def test_weights_that_the_dense_layers_have_no_place_for(tmp_path: Path) -> None:
    weights = make_weights(CONFIG)
    weights["model.layers.1.self_attn.k_layernorm.weight"] = torch.ones(16)
    message = refused(InputError, make_openpangu(tmp_path / "pangu", weights=weights))
    assert "no place in openPangu's dense layers: model.layers.1.self_attn.k_lay" in message


def test_a_config_that_forgets_the_biases(tmp_path: Path) -> None:
    folder = make_openpangu(tmp_path / "pangu", weights=make_weights(CONFIG), bias=False)
    assert "8 weights have no place" in refused(InputError, folder)


def test_a_config_that_promises_biases(tmp_path: Path) -> None:
    weights = make_weights(CONFIG | {"bias": False})
    folder = make_openpangu(tmp_path / "pangu", weights=weights)
    assert "8 weights are missing: model.layers.0.self_attn.k_proj.bias" in refused(
        StorageError, folder
    )


def test_an_untied_config_without_a_head(tmp_path: Path) -> None:
    weights = make_weights(CONFIG | {"tie_word_embeddings": True})
    folder = make_openpangu(tmp_path / "pangu", weights=weights)
    assert "1 weights are missing: lm_head.weight" in refused(StorageError, folder)


def test_a_model_type_that_is_not_known(tmp_path: Path) -> None:
    folder = make_openpangu(tmp_path / "pangu", model_type="PanguNext")
    assert "unknown model type 'PanguNext'; it needs code of its own" in refused(InputError, folder)


def test_an_index_of_another_checkpoint(tmp_path: Path) -> None:
    folder = make_openpangu(tmp_path / "pangu", shards=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]
    moved = places | {"model.norm.weight": "model-00001-of-00003.safetensors"}
    write_json(path, index | {"weight_map": moved})
    assert "says that model.norm.weight is in model-00001-of-00003.safetensors, which" in refused(
        StorageError, folder
    )
    write_json(path, index | {"weight_map": {k: v for k, v in places.items() if "1.mlp" not in k}})
    message = refused(StorageError, folder)
    assert "but model.safetensors.index.json does not name it (3 such tensors)" in message


def test_shards_that_hold_a_tensor_twice(tmp_path: Path) -> None:
    folder = make_openpangu(tmp_path / "pangu", shards=2)
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())
    weights = make_weights(CONFIG)
    names = [name for name, file in places["weight_map"].items() if file.startswith("model-00001")]
    again = {name: weights[name] for name in [*names, "lm_head.weight"]}
    (folder / "twice").mkdir()
    write_shards(folder / "twice", again, 1)
    (folder / "twice/model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    message = refused(StorageError, folder)
    assert "model-00001-of-00002.safetensors: holds lm_head.weight, but" in message
    assert "places it in model-00002-of-00002.safetensors" in message


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = make_openpangu(tmp_path / "pangu", shards=2)
    (folder / "model.safetensors.index.json").unlink()
    assert "there are shards (model-00001-of-00002.safetensors) but no" in refused(
        StorageError, folder
    )


def test_a_clone_without_git_lfs(tmp_path: Path) -> None:
    folder = make_openpangu(tmp_path / "pangu")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (folder / "model.safetensors").write_text(pointer)
    assert "a Git LFS pointer, not the file itself" in refused(StorageError, folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_a_wrong_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = make_weights(CONFIG)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].to(dtype)
    message = refused(InputError, make_openpangu(tmp_path / "pangu", weights=weights))
    assert f"{name} is stored as {'I8' if dtype == torch.int8 else 'F8_E4M3'}" in message
