"""The weights of a model's folder: which files are read, what is not used, what does not fit."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import panguq
from panguq.errors import InputError, PanguqError, StorageError
from panguq.models.hf import load_pretrained, skeleton
from panguq.models.merged_weights import MergedInFiles
from panguq.tensors import nameless
from panguq.tensors.weight_store import WeightStore
from tests.families.models import make
from tests.model_folders import make_folder, make_model, with_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama", tokenizer=False)


def with_weights(folder: Path, copy: Path, change: Any) -> Path:
    """A copy of a model folder whose weights went through `change`."""
    shutil.copytree(folder, copy)
    weights: dict[str, Tensor] = load_file(copy / "model.safetensors")
    save_file(change(weights), copy / "model.safetensors", {"format": "pt"})
    return copy


def refusal(kind: type[PanguqError], path: Path) -> PanguqError:
    with pytest.raises(kind) as caught:
        load_pretrained(path)
    return caught.value


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


# --- which files --------------------------------------------------------------------------------


def test_the_index_decides_and_a_file_beside_it_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model().save_pretrained(tmp_path / "both", max_shard_size="200KB")
    make_model(seed=1).save_pretrained(tmp_path / "stale")
    shutil.copy(tmp_path / "stale" / "model.safetensors", tmp_path / "both")
    model = load_pretrained(tmp_path / "both")
    assert model.panguq_unused_weights == ("model.safetensors",)
    found = model.state_dict()
    assert torch.equal(found[EMBEDDING], make_model().state_dict()[EMBEDDING])
    assert "and not from model.safetensors" in said(caplog)


def test_weights_are_memory_mapped(folder: Path) -> None:
    model = load_pretrained(folder)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ours = [line.split()[0] for line in lines if line.endswith(str(folder / "model.safetensors"))]
    ranges = [[int(end, 16) for end in place.split("-")] for place in ours]
    for parameter in model.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published with a tensor for each expert's gate, up and down projection."""
    path = make_folder(tmp_path_factory.mktemp("models") / "experts", make("qwen3_moe"), False)
    names = load_file(path / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    return path


def test_experts_are_merged_in_files_that_have_no_name(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = load_pretrained(mixture).state_dict()
    experts = {name: tensor for name, tensor in found.items() if tensor.dim() == 3}
    assert len(experts) == 4
    for tensor in experts.values():
        assert str(tensor.untyped_storage().filename).startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    expected = make("qwen3_moe").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in experts.items())


def test_a_disk_that_has_no_room_for_merged_experts(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nameless, "_nameless", full)
    error = refusal(StorageError, mixture)
    assert "cannot write 0 MiB of weights to" in error.message
    assert "No space left on device" in error.message and "TMPDIR" in error.hint


def test_what_cannot_be_joined_is_refused_as_ever() -> None:
    wide, narrow = torch.ones(64, 64), torch.ones(64, 32)
    with MergedInFiles(WeightStore()):
        assert torch.equal(torch.stack([wide, wide], dim=1), wide.unsqueeze(1).expand(-1, 2, -1))
        assert torch.cat([wide, narrow.double()], dim=-1).dtype == torch.float64
        with pytest.raises(RuntimeError, match="equal size"):
            torch.stack([wide, narrow])


def test_stacks_that_are_joined_are_copied_once() -> None:
    parts = [torch.full((64, 64), float(value)) for value in range(6)]
    with MergedInFiles(WeightStore()):
        gate, up, down = (torch.stack(parts[at : at + 2]) for at in (0, 2, 4))
        assert torch.equal(gate, torch.stack(parts[:2]))  # read, so filled
        gate, up = torch.stack(parts[:2]), torch.stack(parts[2:4])
        both = torch.cat([gate, up], dim=1)
        parameter = torch.nn.Parameter(torch.stack(parts[4:]))
    assert both[1].mean(1).tolist() == [1.0] * 64 + [3.0] * 64
    assert up.data_ptr() == both[:, 64:].data_ptr() and torch.equal(up, both[:, 64:])
    assert torch.equal(parameter, down) and down[1].mean() == 5


def test_an_adapter_alone_or_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    both = with_config(folder, tmp_path / "both")
    for path in (both, tmp_path / "alone"):
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "an adapter (adapter_config.json) beside" in refusal(InputError, both).message
    alone = refusal(InputError, tmp_path / "alone")
    assert "holds an adapter (adapter_config.json), not a model" in alone.message
    assert "merge_and_unload" in alone.hint
    with pytest.raises(InputError, match="adapter"):
        skeleton(both)


def test_a_file_name_longer_than_any(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy")
    index = {"weight_map": {HEAD: "x" * 5000}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no weight_map of file names" in refusal(StorageError, copy).message


# --- what is not used ---------------------------------------------------------------------------


def test_weights_that_the_architecture_does_not_use_are_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {
        "model.layers.2.eh_proj.weight": torch.ones(2, 2),
        "mtp.fc.weight": torch.ones(2, 2),
        "mtp.norm.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),  # computed anew
    }
    copy = with_weights(folder, tmp_path / "copy", lambda weights: weights | extra)
    model = load_pretrained(copy)
    unused = ("model.layers.2.eh_proj.weight", "mtp.fc.weight", "mtp.norm.weight")
    assert model.panguq_unused_weights == unused
    assert "no use for 3 weights" in said(caplog)
    assert "model.layers.2.*, mtp.* (2)" in said(caplog)
    compiled = panguq.compile(model, "float")
    assert compiled.report.unused_weights == unused
    compiled.save(tmp_path / "out")
    assert panguq.load(tmp_path / "out").report.unused_weights == unused


def test_weights_that_a_class_ignores_by_itself_are_named_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(
        LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\."]
    )
    name = "model.layers.2.mlp.up_proj.weight"
    copy = with_weights(folder, tmp_path / "copy", lambda w: w | {name: torch.ones(2, 2)})
    assert load_pretrained(copy).panguq_unused_weights == (name,)


def test_a_bias_without_a_place_is_refused(folder: Path, tmp_path: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}
    error = refusal(InputError, with_weights(folder, tmp_path / "copy", lambda w: w | bias))
    assert "model.layers.0.self_attn.q_proj.bias" in error.message
    assert "attention_bias" in error.hint


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "language_model."])
def test_the_prefix_of_a_wrapper_is_named(prefix: str, folder: Path, tmp_path: Path) -> None:
    copy = with_weights(
        folder, tmp_path / "copy", lambda w: {prefix + name: tensor for name, tensor in w.items()}
    )
    error = refusal(StorageError, copy)
    assert HEAD in error.message and f"{prefix}{HEAD}" in error.message
    assert f"start with {prefix}" in error.hint


def test_a_resized_vocabulary_that_config_json_does_not_know(folder: Path, tmp_path: Path) -> None:
    def resize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights | {name: torch.randn(266, 128) for name in (EMBEDDING, HEAD)}

    error = refusal(StorageError, with_weights(folder, tmp_path / "copy", resize))
    assert f"{EMBEDDING} is [266, 128] and not [264, 128]" in error.message
    assert HEAD in error.message and "vocab_size" in error.hint
    known = with_config(tmp_path / "copy", tmp_path / "known", vocab_size=266)
    assert load_pretrained(known).get_input_embeddings().weight.shape[0] == 266


def test_another_head_than_the_tied_one_is_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tied = make_folder(tmp_path / "tied", make_model(tie_word_embeddings=True), tokenizer=False)
    assert load_pretrained(tied).config.tie_word_embeddings is True
    other = with_weights(tied, tmp_path / "other", lambda w: w | {HEAD: torch.ones(264, 128)})
    model = load_pretrained(other)
    assert torch.equal(model.lm_head.weight, torch.ones(264, 128))
    assert model.config.tie_word_embeddings is False
    assert "tie_word_embeddings" in said(caplog)


def test_more_layers_than_weights(folder: Path, tmp_path: Path) -> None:
    deep = with_config(folder, tmp_path / "deep", num_hidden_layers=1000)
    assert "asks for 1000 layers" in refusal(StorageError, deep).message


# --- dtypes -------------------------------------------------------------------------------------


def test_several_dtypes_become_that_of_most_and_it_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def mix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in weights.items()}

    model = load_pretrained(with_weights(folder, tmp_path / "copy", mix))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "most weights are stored as bfloat16" in said(caplog)
    assert "5 of F32" in said(caplog)


def test_a_weight_that_does_not_fit_the_dtype_of_most_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    def mix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t * 1e6 if "norm" in n else t.half() for n, t in weights.items()}

    error = refusal(StorageError, with_weights(folder, tmp_path / "copy", mix))
    assert "norm.weight is stored as F32 and does not fit" in error.message


def test_integers_under_a_parameters_name_are_refused(folder: Path, tmp_path: Path) -> None:
    def small(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights | {"model.layers.0.mlp.experts": torch.ones(2).to(torch.float8_e4m3fn)}

    error = refusal(InputError, with_weights(folder, tmp_path / "copy", small))
    assert "model.layers.0.mlp.experts is stored as F8_E4M3" in error.message


# --- in memory ----------------------------------------------------------------------------------


def test_new_tokens_work_though_the_configuration_was_left_behind() -> None:
    model = make_model(num_hidden_layers=1)
    model.resize_token_embeddings(267)
    model.config.vocab_size = 264
    ids = torch.tensor([[1, 265, 266]])
    compiled: Any = panguq.compile(model, "float")
    with torch.no_grad():
        assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-4)
    assert compiled.interface.vocab_size == compiled.config.vocab_size == 267
