"""config.json and generation_config.json are data: which keys count, what they cannot choose."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import panguq
from panguq.errors import InputError, StorageError
from panguq.models.config import known_settings
from panguq.models.hf import load_pretrained, skeleton
from tests.model_folders import make_folder, make_model, with_config

IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama")


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


CHOICES: list[dict[str, Any]] = [
    dict(attn_implementation="kernels-community/flash-attn2"),
    dict(_attn_implementation="somebody/kernel"),
    dict(_attn_implementation_internal="somebody/kernel"),
    dict(experts_implementation="somebody/kernel"),
    dict(transformers_weights="hidden.safetensors"),
    dict(auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
    dict(kernel_config={"RMSNorm": "somebody/norm"}),
    dict(fusion_config={"mlp": True}),
]


@pytest.mark.parametrize("chosen", CHOICES, ids=lambda chosen: next(iter(chosen)))
def test_code_and_files_are_not_chosen_and_that_is_said(
    chosen: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = with_config(folder, tmp_path / "copy", **chosen)
    make_model(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(copy / "hidden.safetensors")
    (copy / "modeling_own.py").write_text("raise SystemExit('this ran')")
    monkeypatch.setitem(sys.modules, "kernels", None)  # who imports it fails
    for loaded in (load_pretrained(copy), skeleton(copy)):
        assert loaded.config._attn_implementation in (None, "sdpa")
        assert not any(hasattr(loaded.config, key.lstrip("_")) for key in chosen)
    with torch.no_grad():
        assert torch.equal(load_pretrained(copy)(IDS).logits, make_model()(IDS).logits)
    assert next(iter(chosen)) in said(caplog)


def test_transformers_own_attentions_are_no_choice_of_code(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_pretrained(with_config(folder, tmp_path / "copy", attn_implementation="eager"))
    assert said(caplog) == ""


def test_parts_of_a_configuration_choose_no_code_either() -> None:
    part = {"hidden_size": 8, "_attn_implementation": "x/y", "auto_map": {}, "mtp_secret": 1}
    data = {"text_config": part, "vision_config": {"attn_implementation": "x/y", "patch_size": 2}}
    kept = known_settings(transformers.Gemma3Config, data)
    assert kept == {"text_config": {"hidden_size": 8}, "vision_config": {"patch_size": 2}}


def test_what_older_files_say_in_other_words_counts() -> None:
    old = {"sliding_window_pattern": 3, "rope_theta": 5e5, "rope_local_base_freq": 7e3}
    assert known_settings(transformers.Gemma3TextConfig, old) == old
    assert known_settings(transformers.GPT2Config, {"n_embd": 64, "cls": 1}) == {"n_embd": 64}
    unread = {"is_causal": False, "head_dim": 12, "dtype": "torch.float16"}
    assert known_settings(transformers.Qwen2Config, unread) == {**unread, "dtype": "float16"}


_READ = re.compile(r"""(?:kwargs\.(?:pop|get)\(|getattr\((?:self\.)?config, ?)["'](\w+)["']""")
# For training, other tasks, or of encoders and parts that no language model here has.
_NOT_FOR_US = {"gradient_checkpointing", "output_attentions", "token_type_ids"}


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gpt2", "opt",
                   "phi3", "mistral", "mixtral", "olmo2", "falcon", "gpt_neox", "deepseek_v3",
                   "granite", "cohere2", "glm4", "smollm3", "starcoder2", "stablelm", "ernie4_5"],
)  # fmt: skip
def test_every_key_that_transformers_reads_of_a_model_counts(model_type: str) -> None:
    kind = transformers.CONFIG_MAPPING[model_type]
    folder = Path(sys.modules[kind.__module__].__file__ or "").parent
    files = [*folder.glob("modeling_*.py"), folder / f"{kind.__module__.rpartition('.')[2]}.py"]
    names = {name for file in files for name in _READ.findall(file.read_text(encoding="utf-8"))}
    read = {name for name in names if not name.startswith("_")} - _NOT_FOR_US
    assert model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert known_settings(kind, dict.fromkeys(read)).keys() == read


def test_values_that_no_class_takes(folder: Path, tmp_path: Path) -> None:
    for number, wrong in enumerate([dict(dtype="os.system"), dict(architectures=7)]):
        with pytest.raises(StorageError, match=next(iter(wrong))):
            load_pretrained(with_config(folder, tmp_path / f"copy{number}", **wrong))


def test_a_config_of_gigabytes_is_not_read(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy")
    with (copy / "config.json").open("r+b") as file:
        file.truncate(3 << 30)  # a hole
    with pytest.raises(StorageError, match="3072 MiB"):
        load_pretrained(copy)


# --- quantized or not ---------------------------------------------------------------------------


def test_a_quantization_config_of_null_is_none(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy")
    data = json.loads((copy / "config.json").read_text()) | {"quantization_config": None}
    (copy / "config.json").write_text(json.dumps(data))
    assert not hasattr(load_pretrained(copy).config, "quantization_config")
    assert skeleton(copy).dtype == torch.float32


def test_a_quantized_part_is_quantized(folder: Path, tmp_path: Path) -> None:
    part = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    with pytest.raises(InputError, match="quantized already"):
        load_pretrained(with_config(folder, tmp_path / "copy", **part))


# --- generation_config.json ---------------------------------------------------------------------


def test_generation_settings_are_kept_and_choose_no_code(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy")
    settings = {"do_sample": True, "top_k": 7, "custom_generate": "x/y", "compile_config": {}}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    kept = load_pretrained(copy).generation_config
    assert (kept.do_sample, kept.top_k, kept.compile_config) == (True, 7, None)
    assert not hasattr(kept, "custom_generate")


def test_older_folders_say_it_in_config_json(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy", top_k=9, max_length=30)
    (copy / "generation_config.json").unlink()
    kept = load_pretrained(copy).generation_config
    assert (kept.top_k, kept.max_length, kept.bos_token_id) == (9, 30, 1)


def test_damaged_generation_settings_are_named(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"cache_implementation": "x/y"}')
    with pytest.raises(StorageError, match=r"generation_config\.json"):
        load_pretrained(copy)


# --- panguq's own folders -----------------------------------------------------------------------


def test_a_saved_folder_chooses_no_code_either(tmp_path: Path) -> None:
    compiled: Any = panguq.compile(make_model(num_hidden_layers=1), "float")
    compiled.config.update({"transformers_weights": "x.safetensors"})
    compiled.generation_config.custom_generate = "x/y"
    compiled.save(tmp_path / "out")
    loaded: Any = panguq.load(tmp_path / "out")
    assert "transformers_weights" in (tmp_path / "out" / "config.json").read_text()
    assert not hasattr(loaded.config, "transformers_weights")
    assert not hasattr(loaded.generation_config, "custom_generate")


@pytest.mark.parametrize(
    "changed", [{"hidden_act": "os.system"}, {"rope_parameters": {"rope_type": "evil"}}]
)
def test_a_value_that_the_class_does_not_take_is_the_files_fault(
    changed: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=r"config\.json"):
        skeleton(with_config(folder, tmp_path / "copy", **changed))
