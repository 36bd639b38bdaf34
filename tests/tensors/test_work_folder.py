import json
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from panguq.errors import StorageError
from panguq.files import claimed_folder
from panguq.files.claimed_folder import MARKER
from panguq.formats.own.storage import read_folder, write_folder
from panguq.tensors import work_folder
from panguq.tensors.weight_store import WeightStore
from panguq.tensors.work_folder import FACTS, Finished, WorkFolder

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


def open_folder(path: Path, key: dict[str, str] = KEY) -> WorkFolder:
    units = WorkFolder(path)
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
    monkeypatch.setattr(work_folder, "ALONE_BYTES", 1024)


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
def test_a_damaged_unit_is_said_and_computed_again(tmp_path: Path, caplog, damage: str) -> None:
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
    assert_same(WeightStore(units=units).once("pass/unit", finished), finished())
    (record,) = caplog.records
    assert "damaged part" in record.getMessage() and str(facts.parent) in record.getMessage()
    assert units.find("pass/unit") is not None
    assert len(caplog.records) == 1  # it was mended


def test_another_compile_starts_anew_and_says_what_differs(tmp_path: Path) -> None:
    units = open_folder(tmp_path)
    units.keep("pass/unit", finished())
    units.close()
    other = WorkFolder(tmp_path)
    assert other.open_for(KEY | {"recipe": "w4a16"}) == ("recipe",)
    assert other.find("pass/unit") is None
    other.close()
    back = WorkFolder(tmp_path)
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
        WorkFolder(tmp_path)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(StorageError, match="something else"):
        WorkFolder(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "all my work"
    with pytest.raises(StorageError, match="is a file"):
        WorkFolder(tmp_path / "thesis.tex")


@pytest.mark.parametrize("entry", ["units/mine.txt", "temporary/mine.txt", "compile.json"])
def test_a_folder_without_the_mark_is_somebodys(tmp_path: Path, entry: str) -> None:
    """Even one whose names are those that a compile uses."""
    file = tmp_path / "work" / entry
    file.parent.mkdir(parents=True)
    file.write_text("all my work")
    with pytest.raises(StorageError, match=f"no {MARKER}"):
        WorkFolder(tmp_path / "work")
    assert [path for path in (tmp_path / "work").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "all my work"


def test_a_link_in_a_marked_folder_is_not_followed(tmp_path: Path) -> None:
    units = open_folder(tmp_path / "work")
    units.close()
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "work" / "units").symlink_to(home)
    with pytest.raises(StorageError, match="units"):
        WorkFolder(tmp_path / "work")


def test_what_another_put_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    units = open_folder(tmp_path / "work")
    units.keep("pass/unit", finished())
    (tmp_path / "work" / "thesis.tex").write_text("all my work")
    units.remove()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.tex"]


def test_only_a_folder_that_panguq_made_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    for name in ("given", "made"):
        open_folder(tmp_path / name).close()
        units = open_folder(tmp_path / name)  # the mark tells the second process, too
        units.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["given"]
    assert list((tmp_path / "given").iterdir()) == []


@pytest.mark.parametrize("written", ["", "work folder"])
def test_a_process_that_died_writing_the_mark_blocks_nobody(tmp_path: Path, written: str) -> None:
    (tmp_path / MARKER).write_text(written)
    open_folder(tmp_path).close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MARKER).write_text("my own words")
    with pytest.raises(StorageError, match="something else"):
        WorkFolder(tmp_path / "other")


def test_a_folder_that_its_holder_deletes_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    """The second opens the folder, waits for a moment, and gets the lock of what is gone."""
    first = open_folder(tmp_path / "work")
    lock = claimed_folder.fcntl.flock

    def late(handle: int, how: int) -> None:
        first.remove()
        lock(handle, how)

    monkeypatch.setattr(claimed_folder.fcntl, "flock", late)
    second = WorkFolder(tmp_path / "work")
    assert (tmp_path / "work" / MARKER).is_file()
    assert second.path == tmp_path / "work"


@pytest.mark.parametrize("place", range(0, 130, 13))
def test_a_damaged_key_starts_anew_and_that_is_said(tmp_path: Path, caplog, place: int) -> None:
    units = open_folder(tmp_path)
    units.keep("pass/unit", finished())
    units.close()
    file = tmp_path / "compile.json"
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 2
    file.write_bytes(data)
    assert open_folder(tmp_path).find("pass/unit") is None
    assert "compile.json is damaged" in caplog.text


def test_a_finished_unit_is_forced_to_disk_before_it_counts(tmp_path: Path, monkeypatch) -> None:
    """Every file, the one that makes it whole last, then the folders that hold the names."""
    forced: list[str] = []
    units = open_folder(tmp_path / "work")
    real = os.fsync

    def fsync(handle: int) -> None:
        forced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    units.keep("pass/unit", finished())
    files = ["0.safetensors", "small.safetensors"]
    assert forced[:2] == files and forced[2].startswith(f".{FACTS}.partial-")
    assert forced[3:] == ["unit", "pass", "units", "work"]


@pytest.mark.parametrize("name", ["0.safetensors", "small.safetensors", FACTS])
def test_every_changed_byte_is_noticed(tmp_path: Path, caplog, name: str) -> None:
    units = open_folder(tmp_path)
    units.keep("pass/unit", finished())
    file = next(tmp_path.rglob(name))
    data = file.read_bytes()
    for place in range(0, len(data), max(len(data) // 50, 1)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        caplog.clear()
        assert units.find("pass/unit") is None
        assert "damaged part" in caplog.text and str(file.parent) in caplog.text
    file.write_bytes(data)
    assert units.find("pass/unit") is not None


def test_labels_of_any_length_name_files(tmp_path: Path) -> None:
    units = open_folder(tmp_path)
    long = [f"pass/{'модуль.' * 60}{name}" for name in "ab"]
    for number, unit in enumerate(long):
        units.keep(unit, Finished({}, {"number": number}))
    found = [units.find(unit) for unit in long]
    assert [done and done.facts["number"] for done in found] == [0, 1]


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


def test_a_store_without_a_place_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .* to .*gone"):
        WeightStore(tmp_path / "gone").put(torch.zeros(1 << 14))


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
    monkeypatch.setattr("panguq.tensors.safetensors_files.ALONE_BYTES", 1024)
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
    monkeypatch.setattr("panguq.tensors.safetensors_files.ALONE_BYTES", 1024)
    units = open_folder(tmp_path / "work")
    kept = units.keep("pass/unit", finished()).tensors["large_codes"]
    named = {"renamed": kept, "rest": torch.ones(500)}
    write_folder(tmp_path / "out", {}, named, shard_bytes=2000)
    assert torch.equal(read_folder(tmp_path / "out").tensors()["renamed"], kept)
