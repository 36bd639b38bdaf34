import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from panguq.errors import StorageError
from panguq.files import partial_folder as partial_module
from panguq.files.manifest import MANIFEST, manifest_text
from panguq.files.partial_folder import partial_folder
from panguq.files.strict_json import parse_json
from panguq.formats.own import storage
from panguq.formats.own.storage import read_folder, write_folder
from panguq.tensors.safetensors_files import DTYPES, Shard, header_of, plan_shards

FILES = {"recipe.yaml": "name: w8a8\n", "config.json": '{"a": 1}', "tokenizer.model": b"\x00\xff"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, generator=generator)
    return {
        "embed.weight": base,
        "head.weight": base,  # tied
        "transposed": base.t(),
        "row": base[2:4],
        "every_second": base[:, ::2],
        "codes": torch.randint(-128, 128, (5, 3), dtype=torch.int8, generator=generator),
        "packed": torch.randint(0, 256, (7,), dtype=torch.uint8, generator=generator),
        "half": base.to(torch.bfloat16),
        "empty": torch.empty(0, dtype=torch.bool),
        "empty_matrix": torch.empty(3, 0),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(base[0]),
        "strange": torch.tensor([float("nan"), -0.0, float("inf")]),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other)]
        assert torch.equal(*as_bytes), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write_folder(tmp_path / "out", FILES, tensors())
    return tmp_path / "out"


# --- what is written is what is read ----------------------------------------------------------


def test_round_trip(saved: Path) -> None:
    folder = read_folder(saved)
    assert_same(folder.tensors(), tensors())
    assert folder.text("recipe.yaml") == "name: w8a8\n"
    assert folder.json("config.json") == {"a": 1}
    assert folder.data("tokenizer.model") == b"\x00\xff"
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.zeros(1, dtype=dtype)}
    write_folder(tmp_path / "out", {}, values)
    assert_same(read_folder(tmp_path / "out").tensors(), values)


def test_safetensors_itself_reads_the_weights(saved: Path) -> None:
    found = load_file(saved / "weights.safetensors")
    assert_same(found, {n: t for n, t in tensors().items() if n != "head.weight"})


def test_tied_tensors_are_written_once_and_come_back_tied(saved: Path) -> None:
    found = read_folder(saved).tensors()
    assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()
    assert json.loads((saved / MANIFEST).read_text())["aliases"] == {"head.weight": "embed.weight"}


def test_no_tensors(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", FILES, {})
    assert read_folder(tmp_path / "out").tensors() == {}


def test_save_load_save_gives_the_same_bytes(saved: Path) -> None:
    folder = read_folder(saved)
    files = {name: folder.data(name) for name in folder.names if name in FILES}
    again = saved.parent / "again"
    write_folder(again, dict(reversed(files.items())), dict(reversed(folder.tensors().items())))
    assert contents(again) == contents(saved)


def test_shards(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", FILES, tensors(), shard_bytes=200)
    names = read_folder(tmp_path / "out").manifest["weights"]
    assert len(names) > 2
    assert names[0] == f"weights-00001-of-{len(names):05}.safetensors"
    assert_same(read_folder(tmp_path / "out").tensors(), tensors())


def test_only_a_tensor_above_the_limit_makes_a_shard_above_it() -> None:
    sizes = {"a": torch.zeros(100), "b": torch.zeros(10), "c": torch.zeros(10)}
    shards, _ = plan_shards(sizes, shard_bytes=80)
    assert [len(shard.tensors) for shard in shards] == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        torch.empty(2, device="meta"),
        torch.zeros(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        torch._subclasses.FakeTensorMode().from_tensor(torch.zeros(2)),
    ],
    ids=["meta", "complex", "sparse", "fake"],
)
def test_tensors_that_cannot_be_saved(tmp_path: Path, bad: torch.Tensor) -> None:
    with pytest.raises(StorageError, match=r"cannot save tensor layer\.weight"):
        write_folder(tmp_path / "out", {}, {"layer.weight": bad})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "", ".hidden", MANIFEST, "weights.safetensors", "a\n", "ä"]
)
def test_file_names_that_are_refused_at_writing(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="cannot name a file"):
        write_folder(tmp_path / "out", {name: ""}, {})


def test_reading_is_memory_mapped(tmp_path: Path) -> None:
    values = {f"w{i}": torch.ones(50 << 18) for i in range(4)}  # 4 x 50 MiB
    write_folder(tmp_path / "out", {}, values)
    del values
    script = f"""
import re
from panguq.formats.own.storage import read_folder
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
import torch, safetensors.torch
before = anonymous()
tensors = read_folder({str(tmp_path / "out")!r}).tensors()
assert sum(float(t.sum(dtype=torch.float64)) for t in tensors.values()) == 4 * (50 << 18)
print(anonymous() - before)
"""
    grown_mib = float(subprocess.check_output([sys.executable, "-c", script]))
    assert grown_mib < 20


# --- nothing half written ---------------------------------------------------------------------


def test_an_existing_folder_is_refused(saved: Path) -> None:
    before = contents(saved)
    with pytest.raises(StorageError, match="already exists"):
        write_folder(saved, {}, {})
    assert contents(saved) == before


def test_overwrite(saved: Path) -> None:
    loaded = read_folder(saved).tensors()  # stays readable although its file goes
    write_folder(saved, {"new.txt": "x"}, {"embed": loaded["embed.weight"]}, overwrite=True)
    assert read_folder(saved).names == ("new.txt", "weights.safetensors")
    assert_same(loaded, tensors())
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_overwrite_spares_what_panguq_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not written by panguq"):
        write_folder(tmp_path / "home", {}, {}, overwrite=True)
    with pytest.raises(StorageError, match="is a file"):
        write_folder(tmp_path / "file", {}, {}, overwrite=True)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", {}, {}, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, PermissionError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], overwrite: bool
) -> None:
    if overwrite:
        write_folder(tmp_path / "out", FILES, tensors())
    before = contents(tmp_path / "out") if overwrite else None

    def chunks(shard: Shard):  # type: ignore[no-untyped-def]
        yield b"half"
        raise error

    monkeypatch.setattr(Shard, "chunks", chunks)
    expected = StorageError if issubclass(error, OSError) else error
    with pytest.raises(expected):
        write_folder(tmp_path / "out", {}, tensors(), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    assert before is None or contents(tmp_path / "out") == before


def test_the_old_folder_returns_if_the_new_one_cannot_take_its_name(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(partial_module.os, "rename", failing)
    with pytest.raises(StorageError, match="input/output error"):
        write_folder(saved, {}, {}, overwrite=True)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(StorageError, match="appeared"), partial_folder(target, overwrite=False):
        target.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


_KILLED = """
import sys, time, torch
from panguq.formats.own.storage import write_folder
from panguq.tensors.safetensors_files import Shard
whole = Shard.chunks
def half(shard):
    for chunk in whole(shard):
        yield chunk[: len(chunk) // 2]
        print("writing", flush=True)
        time.sleep(60)
Shard.chunks = half
write_folder(sys.argv[1], {"a.txt": "a"}, {"w": torch.ones(1000)}, overwrite=True)
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_in_the_middle(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    if overwrite:
        write_folder(out, FILES, tensors())
    before = contents(out) if overwrite else None
    command = [sys.executable, "-c", _KILLED, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        (alive,) = tmp_path.glob(".out.partial-*")
        with suppress(InterruptedError), partial_folder(out, overwrite=True):
            assert alive.exists()  # a second writer spares the living first
            raise InterruptedError
        process.send_signal(signal.SIGKILL)
    (partial,) = tmp_path.glob(".out.partial-*")
    assert (partial / "weights.safetensors").stat().st_size > 0
    with pytest.raises(StorageError, match="interrupted"):
        read_folder(partial)
    if overwrite:
        assert contents(out) == before
    else:
        with pytest.raises(StorageError, match="no such folder"):
            read_folder(out)
    write_folder(out, FILES, tensors(), overwrite=True)
    assert not partial.exists()
    assert_same(read_folder(out).tensors(), tensors())


def test_a_kill_between_the_two_renames_is_explained_and_cleared(saved: Path) -> None:
    aside = saved.with_name(".out.replaced-0123abcd")
    saved.rename(aside)
    with pytest.raises(StorageError, match=re.escape(str(aside))):
        read_folder(saved)
    write_folder(saved, FILES, tensors())
    assert not aside.exists()


@pytest.mark.parametrize("name", [".out.partial-0123abcd", ".out.replaced-0123abcd"])
def test_somebodys_folder_with_a_name_of_ours_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")
    for _ in range(2):
        write_folder(tmp_path / "out", FILES, tensors(), overwrite=True)
    assert (tmp_path / name / "thesis.tex").read_text() == "years of work"


def test_a_model_with_somebodys_file_in_it_is_not_overwritten(saved: Path) -> None:
    (saved / "thesis.tex").write_text("years of work")
    before = contents(saved)
    with pytest.raises(StorageError, match=r"holds thesis\.tex, which panguq did not write"):
        write_folder(saved, FILES, tensors(), overwrite=True)
    assert contents(saved) == before


def test_a_folder_that_is_exchanged_meanwhile_is_not_replaced(saved: Path) -> None:
    """What was panguq's when the save began is somebody's when it ends."""
    with (
        pytest.raises(StorageError, match="was changed"),
        partial_folder(saved, overwrite=True, is_ours=storage._is_model),
    ):
        (saved / "thesis.tex").write_text("years of work")
    assert (saved / "thesis.tex").read_text() == "years of work"


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "write_file", lambda *_: pytest.fail("it began to write"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"1\.4 MiB needed in .*, 0\.0 MiB free"):
        write_folder(tmp_path / "out", {}, {"w": torch.zeros(100_000)})
    assert list(tmp_path.iterdir()) == []


def test_a_limit_reached_in_the_middle(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"1\.4 MiB needed in") as caught:
            write_folder(tmp_path / "out", {}, {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root; the limit above is tested everywhere")
    try:
        values = {f"w{i}": torch.zeros(250_000) for i in range(5)}
        with pytest.raises(StorageError, match=r"not enough space: 5\.8 MiB needed"):
            write_folder(disk / "out", {}, values)
        plenty = shutil.disk_usage(disk)._replace(free=1 << 40)
        monkeypatch.setattr("shutil.disk_usage", lambda _: plenty)
        with pytest.raises(StorageError, match="disk is full") as caught:
            write_folder(disk / "out", {}, values)
        assert "5.8 MiB needed in " + str(disk) in caught.value.message
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- damaged folders ----------------------------------------------------------------------------


def test_missing_folder_and_manifest(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(StorageError, match="nowhere: no such folder"):
        read_folder(tmp_path / "nowhere")
    (saved / MANIFEST).unlink()
    with pytest.raises(StorageError, match=r"manifest\.json: missing"):
        read_folder(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not JSON"),
        ("[1, 2]", "not a compiled model"),
        ('{"format": "other"}', "not a compiled model"),
        ('{"format": "panguq", "version": 2}', "format version 2, but this panguq reads 1"),
        ('{"format": "panguq", "version": 1}', "entries are missing"),
        ('{"format": "panguq", "format": "panguq"}', "a key occurs twice"),
        ('{"format": NaN}', "NaN is no JSON number"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"format": ' + "9" * 5000 + "}", "not JSON"),
        ("\udcff", "not JSON"),
    ],
)
def test_manifests_of_others(saved: Path, content: str, message: str) -> None:
    (saved / MANIFEST).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StorageError, match=message) as caught:
        read_folder(saved)
    assert MANIFEST in caught.value.message and caught.value.hint


def forge(saved: Path, **changes: object) -> None:
    manifest = json.loads((saved / MANIFEST).read_text()) | changes
    (saved / MANIFEST).write_bytes(manifest_text(manifest))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", MANIFEST])
def test_file_names_that_escape(saved: Path, name: str) -> None:
    (saved.parent / "secret").write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    forge(saved, files={name: {"bytes": 1, "sha256": digest}}, weights=[])
    with pytest.raises(StorageError, match="no plain file name"):
        read_folder(saved)


def test_links_and_pipes_are_not_followed(saved: Path) -> None:
    path = saved / "recipe.yaml"
    path.rename(saved.parent / "elsewhere")
    path.symlink_to(saved.parent / "elsewhere")
    with pytest.raises(StorageError, match=r"recipe\.yaml: cannot be opened: it is a link"):
        read_folder(saved)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match=r"recipe\.yaml: not a regular file"):
        read_folder(saved)


def test_a_link_to_the_whole_folder_is_fine(saved: Path) -> None:
    link = saved.parent / "latest"
    link.symlink_to(saved)
    assert_same(read_folder(link).tensors(), tensors())


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": ["absent.safetensors"]},
        {"weights": [[]]},
        {"files": {"recipe.yaml": {"bytes": True, "sha256": ""}}},
        {"files": []},
        {"aliases": {"a": 1}},
        {"extra": 1},
    ],
)
def test_manifest_entries_of_the_wrong_kind(saved: Path, changes: dict[str, object]) -> None:
    forge(saved, **changes)
    with pytest.raises(StorageError, match="entries are missing or of the wrong kind"):
        read_folder(saved)


def test_consistent_lies_about_weights(saved: Path) -> None:
    forge(saved, aliases={"head.weight": "nothing"})
    with pytest.raises(StorageError, match="stands for nothing"):
        read_folder(saved).tensors()
    forge(saved, weights=["recipe.yaml"], aliases={})
    with pytest.raises(StorageError, match=r"recipe\.yaml: cannot be read as safetensors"):
        read_folder(saved).tensors()


def test_files_that_are_missing_or_unknown(saved: Path) -> None:
    folder = read_folder(saved)
    with pytest.raises(StorageError, match=r"absent\.json: not in this model"):
        folder.json("absent.json")
    with pytest.raises(StorageError, match=r"tokenizer\.model: not text"):
        folder.text("tokenizer.model")
    (saved / "config.json").unlink()
    with pytest.raises(StorageError, match=r"config\.json: missing"):
        read_folder(saved)


@pytest.fixture(scope="module")
def pristine() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "out", FILES, tensors())
        return contents(Path(folder) / "out")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_changed_bit_and_every_cut_is_noticed(
    pristine: dict[str, bytes], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(pristine)))
    content = bytearray(pristine[name])
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[position:]
    else:
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        for other, whole in pristine.items():
            (Path(folder) / other).write_bytes(content if other == name else whole)
        with pytest.raises(StorageError, match=re.escape(name)):
            read_folder(folder)


def test_without_verification_only_sizes_are_compared(saved: Path) -> None:
    (saved / "config.json").write_text('{"a": 2}')
    assert read_folder(saved, verify=False).json("config.json") == {"a": 2}
    (saved / "config.json").write_text('{"a": 22}')
    with pytest.raises(StorageError, match="longer than saved"):
        read_folder(saved, verify=False)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_strict_json_reads_all_json(value: object) -> None:
    assert parse_json(json.dumps(value), "x") == value


def test_tensors_of_whole_cache_lines_begin_on_one() -> None:
    """Where they are mapped, kernels that load aligned lines read them in place."""
    odd, odd_codes = torch.zeros(3), torch.zeros(5, dtype=torch.int8)
    whole, codes = torch.zeros(16), torch.zeros(64, dtype=torch.int8)
    header, names = header_of({"a": odd, "b": codes, "c": whole, "d": odd_codes})
    assert names == ["c", "b", "a", "d"] and len(header) % 64 == 0
    starts = [json.loads(header[8:])[name]["data_offsets"][0] for name in names]
    assert starts == [0, 64, 128, 140]
