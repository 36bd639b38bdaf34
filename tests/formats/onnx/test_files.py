"""The file, and the one with the weights beside it: whole, or not there."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import panguq
from panguq.cli import main
from panguq.errors import StorageError
from panguq.formats.onnx.builder import Weight
from panguq.formats.onnx.export import export_onnx
from panguq.formats.onnx.files import ALIGNMENT, write_onnx
from panguq.formats.onnx.model import OnnxGraph, build
from panguq.formats.onnx.run import OnnxModel
from tests.model_shelf import shared_model, token_ids


@pytest.fixture(scope="module")
def model() -> Any:
    return panguq.compile(shared_model("llama"), "w4a16", calibration=token_ids(2, 16))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_small_models_are_one_file(model: Any, tmp_path: Path) -> None:
    export_onnx(model.artifact, tmp_path / "m.onnx")
    assert list(files(tmp_path)) == ["m.onnx"]


def test_large_weights_lie_beside_it_aligned_and_give_the_same_numbers(
    model: Any, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    graph = build(model.graph, model.interface, "lowered")
    write_onnx(graph, one)
    write_onnx(graph, two, inline_bytes=1000)
    onnx.checker.check_model(str(two))
    weights = onnx.load(str(two), load_external_data=False).graph.initializer
    places = [
        {entry.key: entry.value for entry in weight.external_data}
        for weight in weights
        if weight.data_location == TensorProto.EXTERNAL
    ]
    assert {place["location"] for place in places} == {"two.onnx.data"}
    assert all(int(place["offset"]) % ALIGNMENT == 0 for place in places)
    ids = token_ids(1, 9)
    expected = OnnxModel(one, model.interface).logits(ids)[0]
    assert torch.equal(OnnxModel(two, model.interface).logits(ids)[0], expected)


def test_equal_models_give_equal_bytes(model: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_onnx(model.artifact, tmp_path / name / "m.onnx")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_one_weight_at_a_time_is_made(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert all(reference() is None for reference in alive), "an earlier weight is kept"
        tensor = torch.ones(1024)
        alive.append(weakref.ref(tensor))
        return tensor

    weights = tuple(Weight(f"w{i}", TensorProto.FLOAT, (1024,), make) for i in range(4))
    info = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1024])
    node = helper.make_node("Sum", [weight.name for weight in weights], ["y"])
    proto = helper.make_model(helper.make_graph([node], "g", [], [info]))
    write_onnx(OnnxGraph(proto, weights), tmp_path / "m.onnx", inline_bytes=0)
    assert len(alive) == 4
    onnx.checker.check_model(str(tmp_path / "m.onnx"))


def test_nothing_is_overwritten_unless_asked(model: Any, tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    for taken in (path, data):
        taken.write_bytes(b"mine")
        with pytest.raises(StorageError, match=f"{taken.name} already exists"):
            export_onnx(model.artifact, path)
        assert files(tmp_path) == {taken.name: b"mine"}
        taken.unlink()
    path.write_bytes(b"old")
    data.write_bytes(b"old")
    export_onnx(model.artifact, path, overwrite=True)
    assert list(files(tmp_path)) == ["m.onnx"]  # the old data belonged to the old model
    onnx.checker.check_model(str(path))


def test_a_disk_that_fills_up_leaves_nothing_and_keeps_the_old_file(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        export_onnx(model.artifact, path, overwrite=True)
    assert files(tmp_path) == {"m.onnx": b"old"}


def test_too_little_space_is_said_before_writing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="not enough space"):
        export_onnx(model.artifact, tmp_path / "m.onnx")
    assert files(tmp_path) == {}


def test_a_folder_is_no_file(model: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a folder"):
        export_onnx(model.artifact, tmp_path)


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_a_stage_of_a_saved_model(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(tmp_path / "saved")
    out = tmp_path / "fake-quant.onnx"
    command = ["export-onnx", str(tmp_path / "saved"), "--stage", "fake-quant", "--out", str(out)]
    assert main(command) == 0
    assert "stage fake-quant" in capsys.readouterr().out
    ids = token_ids(1, 9)
    with torch.no_grad():
        expected = model.at_stage("fake-quant")(ids).logits
    torch.testing.assert_close(OnnxModel(out, model.interface).logits(ids)[0], expected)
    assert main(command) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([*command, "--force", "--json"]) == 0
    assert str(out) in capsys.readouterr().out


def test_a_loaded_model_exports_to_the_same_bytes(model: Any, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    export_onnx(model.artifact, tmp_path / "a.onnx")
    export_onnx(panguq.load(tmp_path / "saved").artifact, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_command_writes_every_stage_of_a_dump(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from panguq.dumps.reader import DumpReader

    ids = token_ids(2, 16)
    compiled = panguq.compile(
        shared_model("opt"), "w8a8", calibration=ids, dump_dir=tmp_path / "dump"
    )
    stages = DumpReader(tmp_path / "dump").stages
    for stage in stages:
        out = tmp_path / f"{stage}.onnx"
        assert (
            main(["export-onnx", str(tmp_path / "dump"), "--stage", stage, "--out", str(out)]) == 0
        )
        onnx.checker.check_model(str(out), full_check=True)
        assert OnnxModel(out, compiled.interface).logits(ids)[0].isfinite().all()
    props = onnx.load(str(tmp_path / f"{stages[-1]}.onnx")).metadata_props
    assert {x.key: x.value for x in props} == {
        "panguq.recipe": "w8a8",
        "panguq.stage": stages[-1],
        "panguq.target": "cpu",
    }
    capsys.readouterr()
    assert main(["export-onnx", str(tmp_path / "dump"), "--stage", "99", "--out", "x.onnx"]) == 1
    assert "no stage '99'" in capsys.readouterr().err


def test_data_without_a_model_is_not_overwritten(model: Any, tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_bytes(b"weeks of work")
    with pytest.raises(StorageError, match=r"is there without m\.onnx"):
        export_onnx(model.artifact, tmp_path / "m.onnx", overwrite=True)
    assert files(tmp_path) == {"m.onnx.data": b"weeks of work"}
