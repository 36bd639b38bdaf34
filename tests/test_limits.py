"""Files that ask for all memory, or for hours, are refused before they are read, everywhere."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import panguq
from panguq.check.report import check_folder
from panguq.errors import PanguqError, StorageError
from panguq.files import limits
from panguq.files.manifest import MANIFEST, read_manifest
from panguq.files.safetensors_header import count_tensors
from panguq.lowering.target_files import load_target
from panguq.models.config_limits import check_sizes
from panguq.models.hf import load_pretrained, load_tokenizer, skeleton
from tests.model_folders import make_folder, with_config

GIB = 1 << 30
MEMORY = 200 << 20
CONFIG = Path("config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = make_folder(tmp_path_factory.mktemp("models") / "llama")
    load_pretrained(found), load_tokenizer(found), check_folder(found)  # all modules are imported
    return found


@contextmanager
def little(seconds: float = 2.0) -> Iterator[None]:
    """Fails if the block takes more memory than a refusal may, or longer."""
    before, start = _peak(), time.process_time()
    yield
    assert _peak() - before < MEMORY
    assert time.process_time() - start < seconds


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def grow(path: Path, size: int) -> None:
    """Give the file a hole of this many bytes at its end: it takes no room on the disk."""
    path.touch()
    os.truncate(path, size)


def empty_tensors(path: Path, count: int) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{number}": entry for number in range(count)}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


READERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda path: (load_pretrained(path), load_tokenizer(path)),
    "plan": lambda path: panguq.plan(path, "w8a8"),
    "check": lambda path: check_folder(path),
}
FILES: dict[str, Callable[[Path], None]] = {
    "config": lambda path: grow(path / "config.json", 3 * GIB),
    "tokenizer": lambda path: grow(path / "tokenizer.json", 2 * GIB),
    "vocabulary": lambda path: grow(path / "tokenizer.model", 2 * GIB),
    "index": lambda path: grow(path / "model.safetensors.index.json", 3 * GIB),
    "header": lambda path: (path / "model.safetensors").write_bytes(
        (90 << 20).to_bytes(8, "little") + b"{" + b" " * (90 << 20)
    ),
    "tensors": lambda path: empty_tensors(path / "model.safetensors", 300_000),
}


@pytest.mark.parametrize(
    ("file", "reader"),
    [(f, r) for f in FILES for r in READERS if r != "plan" or f not in ("tokenizer", "vocabulary")],
)
def test_a_file_that_asks_for_too_much(
    reader: str, file: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    FILES[file](copy)
    with little():
        refused(reader, copy)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**5), ("num_hidden_layers", 10**6), ("hidden_size", 10**9),
        ("vocab_size", 10**12), ("max_position_embeddings", 10**12), ("head_dim", 1 << 40),
        ("intermediate_size", 10**300),
    ],
)  # fmt: skip
def test_a_number_that_asks_for_too_much(
    reader: str, key: str, value: int, folder: Path, tmp_path: Path
) -> None:
    with little():
        refused(reader, with_config(folder, tmp_path / "copy", **{key: value}), key)


def refused(reader: str, path: Path, word: str = "") -> None:
    if reader == "check":
        found = [f for f in check_folder(path).findings if f.rule == "damaged-file"]
        assert found and any(word in finding.message for finding in found)
    else:
        with pytest.raises(PanguqError) as caught:
            READERS[reader](path)
        assert word in caught.value.message


def test_a_tokenizer_makes_no_million_layers_either(folder: Path, tmp_path: Path) -> None:
    """It reads config.json where its own settings do not name its class."""
    changed = {"model_type": "qwen3", "num_hidden_layers": 10**8}
    copy = with_config(folder, tmp_path / "copy", **changed)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with little(), pytest.raises(StorageError, match="num_hidden_layers is 100000000"):
        load_tokenizer(copy)


def test_what_a_maker_notes_beside_is_no_size(folder: Path, tmp_path: Path) -> None:
    copy = with_config(folder, tmp_path / "copy", total_parameters=718 * 10**9, trained_on=2**70)
    load_pretrained(copy), load_tokenizer(copy)
    assert not any(f.rule == "damaged-file" for f in check_folder(copy).findings)


def test_experts_are_counted_over_all_layers() -> None:
    check_sizes({"num_hidden_layers": 200, "n_routed_experts": 1024}, CONFIG)
    with pytest.raises(StorageError, match="layers of 4096 experts"):
        check_sizes({"num_hidden_layers": 200, "n_routed_experts": 4096}, CONFIG)


def test_the_largest_models_there_are_pass() -> None:
    """openPangu-Ultra-MoE-718B's shape, Kimi-K2's experts, Gemma's vocabulary, Llama 4's positions,
    and twice the layers of any."""
    check_sizes(
        {
            "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 252,
            "num_attention_heads": 128, "n_routed_experts": 384, "vocab_size": 262208,
            "max_position_embeddings": 10485760, "rope_theta": 5_000_000_000,
            "eos_token_id": [1, 2],
            "rope_scaling": {"factor": 40, "original_max_position_embeddings": 4096},
            "sliding_window": None, "attention_chunk_size": 8192,
        },
        CONFIG,
    )  # fmt: skip


@settings(max_examples=40)
@given(st.dictionaries(st.text(), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=5,
)))  # fmt: skip
def test_a_config_is_taken_or_refused_by_name(config: dict[str, Any]) -> None:
    try:
        check_sizes(config, CONFIG)
    except StorageError as error:
        assert error.message.startswith("config.json: ")


def test_many_tensors_are_few_enough(tmp_path: Path) -> None:
    """100,000 in one file are no attack."""
    empty_tensors(tmp_path / "model.safetensors", 100_000)
    assert count_tensors(tmp_path / "model.safetensors") == 100_000


def test_the_bound_on_a_whole_folder(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("panguq.files.safetensors_header.TENSORS", 10)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    weights = {"weight_map": {"a": "model-1.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(StorageError, match="the most read is 10"):
        skeleton(copy)
    assert any("the most read is 10" in f.message for f in check_folder(copy).findings)


def test_panguqs_own_files_have_bounds(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8))
    saved = tmp_path / "saved"
    panguq.compile(module, "w8a16", example_inputs=(torch.randn(4, 8),)).save(saved)
    grow(saved / MANIFEST, 3 * GIB)
    with little(), pytest.raises(StorageError, match="MiB"):
        read_manifest(saved / MANIFEST)
    for name in ("target.json", "target.yaml"):
        grow(tmp_path / name, 3 * GIB)
        with little(), pytest.raises(PanguqError):
            load_target(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="not a regular file"):
        limits.read_limited(tmp_path / "pipe", 10)
