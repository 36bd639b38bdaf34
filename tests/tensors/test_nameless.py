"""Large tensors lie in files that nobody sees and that go with them."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from panguq.errors import StorageError
from panguq.ir.ops.packing import pack_int4
from panguq.ir.ops.quantize import dequantize_weight
from panguq.tensors import nameless
from panguq.tensors.folded_weight import FoldedWeight, materialized
from panguq.tensors.nameless import empty_in_file, roomy_empty


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def is_in(folder: Path, tensor: torch.Tensor) -> bool:
    return str(tensor.untyped_storage().filename).startswith(str(folder))


def open_files(folder: Path) -> int:
    maps = Path("/proc/self/maps").read_text()
    return sum(str(folder) in line for line in maps.splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_the_file_has_no_name_and_goes_with_its_tensor(folder: Path) -> None:
    tensor = empty_in_file((3, 5), torch.bfloat16).fill_(2)
    assert is_in(folder, tensor) and tensor.sum() == 30
    assert os.listdir(folder) == [] and open_files(folder) == 1
    del tensor
    assert open_files(folder) == 0


def test_a_full_disk_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"cannot write 4 MiB .*: No space left") as caught:
        empty_in_file((1 << 20,), torch.float32)
    assert "TMPDIR" in caught.value.hint
    assert os.listdir(folder) == []


def test_only_large_ones_are_in_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameless, "LARGE_BYTES", 4096)
    assert is_in(folder, roomy_empty((1024,), torch.float32))
    assert not is_in(folder, roomy_empty((1023,), torch.float32))


def test_what_is_computed_of_all_experts_weights_takes_no_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (4, 16, 32), generator=generator).to(torch.int8)
    weight = torch.randn(4, 16, 32, generator=generator)
    scale = torch.rand(4, 16, 1, generator=generator)

    def everything() -> list[torch.Tensor]:
        folded = FoldedWeight(weight, {2: torch.full((32,), 3.0, dtype=torch.float64)})
        back = dequantize_weight(codes, scale, None, 32, torch.float32)
        return [pack_int4(codes), back, materialized(folded)]

    in_memory = everything()
    monkeypatch.setattr(nameless, "LARGE_BYTES", 1024)
    in_files = everything()
    assert all(is_in(folder, tensor) for tensor in in_files)
    assert all(torch.equal(*pair) for pair in zip(in_memory, in_files, strict=True))
