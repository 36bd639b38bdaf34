import json
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from panguq.errors import StorageError
from panguq.ir import unit_folder
from panguq.ir.unit_folder import FACTS, Finished, UnitFolder
from panguq.ir.weight_store import WeightStore
from panguq.storage import read_folder, write_folder

KEY = {"recipe": "w8a8", "model": "abc"}


def finished() -> Finished:
    generator = torch.Generator().manual_seed(0)
    return Finished(
        {
            "large_codes": torch.randint(
                -128, 128, (64, 70), dtype=torch.int8, generator=generator
            ),
            "scale": torch.randn(64, 2, generator=generator).bfloat16(),
            "transposed": torch.randn(6, 8, generator=generator).t(),
            "empty": torch.empty(0, 3),
        },
        {"sqnr_db": 20.1234567890123, "channels": 3, "chosen": None, "why": "größer", "is": True},
    )


def open_folder(path: Path, key: dict[str, str] = KEY) -> UnitFolder:
    units = UnitFolder(path)
    units.open_for(key)
    return units


def assert_same(one: Finished, other: Finished) -> None:
    assert list(one.tensors) == list(other.tensors)
    assert dict(one.facts) == dict(other.facts)
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name]), name


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a kilobyte have files of their own here."""
    monkeypatch.setattr(unit_folder, "ALONE_BYTES", 1024)


def test_a_finished_unit_is_read_back_by_the_next_process(tmp_path: Path) -> None:
    units = open_folder(tmp_path / "work")
    kept = units.keep("05_quantize-weights/model.layers.0:linear/../x", finished())
    assert_same(kept, finished())
    units.close()
    again = open_folder(tmp_path / "work")
    found = again.find("05_quantize-weights/model.layers.0:linear/../x")
    assert found is not None and again.found == 1
    assert_same(found, finished())
    assert again.find("05_quantize-weights/other") is None
    assert {path.name for path in tmp_path.iterdir()} == {"work"}  # ".." led nowhere


def test_a_unit_without_its_facts_was_not_finished(tmp_path: Path) -> None:
    units = open_folder(tmp_path)
    units.keep("pass/unit", finished())
    facts = next(tmp_path.rglob(FACTS))
    facts.rename(facts.with_name("facts.json.partial"))
    assert units.find("pass/unit") is None
    assert_same(units.keep("pass/unit", finished()), finished())


@pytest.mark.parametrize("damage", ["truncate", "no json", "other name"])
def test_a_damaged_unit_is_an_error(tmp_path: Path, damage: str) -> None:
    units = open_folder(tmp_path)
    units.keep("pass/unit", finished())
    file = next(tmp_path.rglob("0.safetensors"))
    facts = next(tmp_path.rglob(FACTS))
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "no json":
        facts.write_text("{")
    else:
        order = json.loads(facts.read_text())
        facts.write_text(json.dumps(order | {"large": ["another"], "names": ["another"]}))
    with pytest.raises(StorageError, match="damaged part"):
        units.find("pass/unit")


def test_another_compile_starts_anew_and_says_what_differs(tmp_path: Path) -> None:
    units = open_folder(tmp_path)
    units.keep("pass/unit", finished())
    units.close()
    other = UnitFolder(tmp_path)
    assert other.open_for(KEY | {"recipe": "w4a16"}) == ("recipe",)
    assert other.find("pass/unit") is None
    other.close()
    back = UnitFolder(tmp_path)
    assert back.open_for(KEY) == ("recipe",)
    assert back.find("pass/unit") is None


def test_units_without_a_key_are_nobodys(tmp_path: Path) -> None:
    units = open_folder(tmp_path)
    units.keep("pass/unit", finished())
    units.close()
    (tmp_path / "compile.json").unlink()
    assert open_folder(tmp_path).find("pass/unit") is None


def test_two_compiles_cannot_share_a_folder(tmp_path: Path) -> None:
    open_folder(tmp_path)
    with pytest.raises(StorageError, match="in use"):
        UnitFolder(tmp_path)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(StorageError, match="something else"):
        UnitFolder(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "all my work"
    with pytest.raises(StorageError, match="is a file"):
        UnitFolder(tmp_path / "thesis.tex")


@contextmanager
def largest_file(size: int):
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old_handler)


def test_a_full_disk_is_one_error_and_leaves_nothing_of_the_unit(tmp_path: Path) -> None:
    units = open_folder(tmp_path)
    with largest_file(2000), pytest.raises(StorageError, match="cannot write"):
        units.keep("pass/unit", finished())
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert units.find("pass/unit") is None
    units.keep("pass/unit", finished())  # there is space again


def test_the_store_computes_a_unit_once(tmp_path: Path) -> None:
    calls = []

    def compute() -> Finished:
        calls.append(1)
        return finished()

    plain = WeightStore()
    assert_same(plain.once("a", compute), finished())
    assert_same(plain.once("a", compute), finished())
    assert len(calls) == 2  # nothing is remembered without a folder
    store = WeightStore(units=open_folder(tmp_path))
    assert_same(store.once("a", compute), finished())
    assert_same(store.once("a", compute), finished())
    assert len(calls) == 3


def test_a_saved_model_shares_the_large_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("panguq.weight_files.ALONE_BYTES", 1024)
    units = open_folder(tmp_path / "work")
    kept = dict(units.keep("pass/unit", finished()).tensors)
    write_folder(tmp_path / "linked", {}, kept, shard_bytes=2000)
    write_folder(tmp_path / "written", {}, dict(finished().tensors), shard_bytes=2000)
    files = {p.name: p.read_bytes() for p in (tmp_path / "linked").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "written").iterdir()}
    inode = next((tmp_path / "work").rglob("0.safetensors")).stat().st_ino
    assert inode in {p.stat().st_ino for p in (tmp_path / "linked").iterdir()}
    units.remove()
    tensors = read_folder(tmp_path / "linked").tensors()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in finished().tensors.items())
    assert torch.equal(kept["large_codes"], finished().tensors["large_codes"])


def test_a_renamed_tensor_is_written_not_linked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("panguq.weight_files.ALONE_BYTES", 1024)
    units = open_folder(tmp_path / "work")
    kept = units.keep("pass/unit", finished()).tensors["large_codes"]
    named = {"renamed": kept, "rest": torch.ones(500)}
    write_folder(tmp_path / "out", {}, named, shard_bytes=2000)
    assert torch.equal(read_folder(tmp_path / "out").tensors()["renamed"], kept)
