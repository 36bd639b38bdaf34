"""Checkpoint folders: whole or not there, in shards, one tensor in memory at a time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from panguq.errors import StorageError
from panguq.formats.checkpoint.folder import Output, marked, write_checkpoint

FILES = {"config.json": json.dumps(marked({"model_type": "llama"}, "w8a8")), "a.txt": b"\x00"}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, generator=generator)
    return {
        "b.weight": base,
        "a.codes": torch.randint(-128, 128, (5, 3), dtype=torch.int8, generator=generator),
        "transposed": base.t(),
        "half": base.to(torch.bfloat16),
        "shape": torch.tensor([8, 6]),
        "empty": torch.empty(0, 3),
    }


def outputs() -> dict[str, Output]:
    return {name: Output.of(tensor) for name, tensor in tensors().items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_written(folder: Path) -> None:
    found, wanted = read(folder), tensors()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_one_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", FILES, outputs())
    names = ["SHA256SUMS", "a.txt", "config.json", "model.safetensors"]
    assert sorted(contents(tmp_path / "out")) == names
    assert_written(tmp_path / "out")


@pytest.mark.parametrize("stem", ["model", "quant_model_weights"])
@pytest.mark.parametrize("limit", [1, 200, 300])
def test_shards_with_an_index(tmp_path: Path, limit: int, stem: str) -> None:
    write_checkpoint(tmp_path / "out", FILES, outputs(), stem=stem, shard_bytes=limit)
    assert_written(tmp_path / "out")
    index = json.loads((tmp_path / "out" / f"{stem}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    shards = sorted(tmp_path.glob(f"out/{stem}-*-of-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    for shard in shards:
        stored = load_file(shard)
        assert sum(t.nbytes for t in stored.values()) <= limit or len(stored) == 1
        assert {n for n, file in index["weight_map"].items() if file == shard.name} == set(stored)


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_checkpoint(tmp_path / name, FILES, outputs(), shard_bytes=200)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert not any(earlier() is not None for earlier in made)
        tensor = torch.ones(1000)
        made.append(weakref.ref(tensor))
        return tensor

    many = {f"t{i}": Output(torch.float32, (1000,), make) for i in range(5)}
    write_checkpoint(tmp_path / "out", FILES, many)
    assert len(made) == 5


# --- what is there already ----------------------------------------------------------------------


def refusal(path: Path, **options: Any) -> StorageError:
    with pytest.raises(StorageError) as caught:
        write_checkpoint(path, FILES, outputs(), **options)
    return caught.value


def test_a_folder_is_never_overwritten_unasked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", FILES, outputs())
    before = contents(tmp_path / "out")
    assert "already exists" in refusal(tmp_path / "out").message
    assert contents(tmp_path / "out") == before
    write_checkpoint(tmp_path / "out", FILES, {"x": Output.of(torch.ones(3))}, overwrite=True)
    assert list(read(tmp_path / "out")) == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("config", [None, "{", "[]", '{"model_type": "llama"}'])
def test_what_panguq_did_not_write_is_never_overwritten(tmp_path: Path, config: Any) -> None:
    """The source model's own folder, above all."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"precious")
    if config is not None:
        (tmp_path / "out" / "config.json").write_text(config)
    before = contents(tmp_path / "out")
    assert "no checkpoint that panguq wrote" in refusal(tmp_path / "out", overwrite=True).message
    assert contents(tmp_path / "out") == before


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert "is a file" in refusal(tmp_path / "out", overwrite=True).message


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", FILES, outputs())
    before = contents(tmp_path / "out")

    def fail() -> Tensor:
        raise OSError(28, "No space left on device")

    broken = {**outputs(), "zzz": Output(torch.float32, (2,), fail)}
    with pytest.raises(StorageError, match="the disk is full"):
        write_checkpoint(tmp_path / "out", FILES, broken, overwrite=True)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    huge = {"t": Output(torch.float32, (1 << 50,), lambda: torch.ones(1))}
    with pytest.raises(StorageError, match="not enough space"):
        write_checkpoint(tmp_path / "out", FILES, huge)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_with_somebodys_file_in_it_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_checkpoint(out, FILES, outputs(), shard_bytes=100)
    write_checkpoint(out, FILES, outputs(), overwrite=True)  # fewer files, all of them known
    (out / "adapter.safetensors").write_bytes(b"weeks of work")
    assert "adapter.safetensors, which panguq" in refusal(out, overwrite=True).message
    assert (out / "adapter.safetensors").read_bytes() == b"weeks of work"
