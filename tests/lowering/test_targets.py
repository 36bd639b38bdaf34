"""Targets are data with a source for every number; a target file is checked number by number."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panguq.errors import LoweringError
from panguq.files.plain_yaml import dump_yaml, parse_yaml
from panguq.lowering.ascend.machine import ASCEND_UNITS
from panguq.lowering.cpu.target import CPU
from panguq.lowering.target import Constant, check_target
from panguq.lowering.target_files import load_target, save_target
from panguq.lowering.targets import TARGETS, find_target

ASCEND = [name for name in TARGETS if name.startswith("ascend")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sound target file, named `mine`."""
    path = tmp_path / "mine.yaml"
    save_target(replace(find_target("ascend910b1"), name="mine"), path)
    return path


def change(path: Path, edit) -> Path:
    data = parse_yaml(path.read_text(), str(path))
    edit(data)
    path.write_text(dump_yaml(data))
    return path


def test_the_built_in_targets() -> None:
    assert [*TARGETS] == [
        "cpu",
        "ascend910b1",
        "ascend910b2",
        "ascend910b3",
        "ascend910b4",
        "ascend950pr",
        "reference",
    ]
    assert [int(find_target(name)["cube_cores"]) for name in ASCEND] == [24, 24, 20, 20, 32]
    memory = [int(find_target(name)["hbm_gb_per_s"]) for name in ASCEND]
    assert memory == [1600, 1600, 1600, 800, 1600]


@pytest.mark.parametrize("name", TARGETS)
def test_built_in_targets_are_sound(name) -> None:
    check_target(find_target(name), name)


@pytest.mark.parametrize("name", ASCEND)
def test_every_constant_has_a_source_or_says_what_it_was_fitted_to(name) -> None:
    constants = find_target(name).constants
    assert set(constants) == set(ASCEND_UNITS)
    assert all(len(c.source) > 20 for c in constants.values())
    fitted = {key for key, c in constants.items() if c.fitted}
    timed = {key for key in ASCEND_UNITS if key.startswith(("int8_", "w8a16_"))}
    timed.remove("int8_load_bytes_per_cycle")  # computed from published times
    published = {"float_memory_gb_per_s", "float_start_us", "float_exposed", "epilogue_cycles"}
    if name == "ascend950pr":  # nothing else is timed there; rates of memory are derived
        assert fitted == timed - {
            "int8_memory_gb_per_s",
            "w8a16_memory_gb_per_s",
            "w8a16_start_us",
            "w8a16_sum_cycles",
        } | {"epilogue_cycles", "unaligned_cube"}
        return
    catlass = {"launch_us", "core_load_bytes_per_cycle", "vendor_dequantize_bytes_per_cycle"}
    assert fitted == (timed - {"w8a16_bfloat16_times"}) | published | catlass


@pytest.mark.parametrize(
    ("given", "near"),
    [("ascend910b_1", "ascend910b1"), ("ASCEND910B3", "ascend910b3"), ("cpus", "cpu")],
)
def test_an_unknown_target_names_the_nearest(given, near) -> None:
    with pytest.raises(LoweringError, match=f"unknown target '{given}'") as caught:
        find_target(given)
    assert caught.value.hint.startswith(f"did you mean {near}? The targets are cpu, ascend910b1")


@pytest.mark.parametrize("name", TARGETS)
def test_saved_and_loaded_targets_are_equal(name, tmp_path) -> None:
    target = replace(find_target(name), name="cpu" if name == "cpu" else "mine")
    path = tmp_path / "new folder" / "target.yaml"
    save_target(target, path)
    loaded = find_target(path)
    assert (loaded.name, loaded.kind) == (target.name, target.kind)
    assert dict(loaded.constants) == dict(target.constants)
    assert dict(loaded.kernels) == dict(target.kernels)
    assert [p.name for p in path.parent.iterdir()] == ["target.yaml"]


def test_a_target_may_be_written_in_json(file) -> None:
    as_json = file.with_suffix(".json")
    as_json.write_text(json.dumps(parse_yaml(file.read_text(), "it")))
    assert load_target(as_json).constants == load_target(file).constants


def test_a_failed_save_leaves_the_old_file(file, monkeypatch) -> None:
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LoweringError, match=r"mine\.yaml: cannot be written: No space left"):
        save_target(replace(find_target("ascend910b3"), name="mine"), file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "constants.launch_us: -1 is not above zero"),
        (0, "constants.launch_us: 0 is not above zero"),
        ("fast", "constants.launch_us: 'fast' is not a number"),
        (True, "constants.launch_us: True is not a number"),
        (None, "constants.launch_us: None is not a number"),
        ([1], r"constants.launch_us: \[1\] is not a number"),
    ],
)
def test_a_value_that_cannot_be(file, value, message) -> None:
    change(file, lambda data: data["constants"]["launch_us"].update(value=value))
    with pytest.raises(LoweringError, match=rf"mine\.yaml: {message}"):
        find_target(file)


@pytest.mark.parametrize("spelled", [".nan", ".inf", "-.inf"])
def test_a_value_that_is_not_finite(file, spelled) -> None:
    file.write_text(file.read_text().replace("value: 13.25", f"value: {spelled}"))
    with pytest.raises(LoweringError, match=r"mine\.yaml: constants.launch_us.value: .* finite"):
        find_target(file)


def test_nan_in_json(file) -> None:
    as_json = file.with_suffix(".json")
    data = parse_yaml(file.read_text(), "it")
    data["constants"]["launch_us"]["value"] = math.nan
    as_json.write_text(json.dumps(data))
    with pytest.raises(LoweringError, match=r"mine\.json: not JSON: NaN"):
        find_target(as_json)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["constants"].pop("l2_mib"), r"constants\.l2_mib: is missing"),
        (lambda d: d.pop("constants"), r"constants\.cube_cores: is missing"),
        (lambda d: d.pop("name"), "name: is missing"),
        (lambda d: d.pop("kind"), "kind: None is no kind"),
        (lambda d: d.update(kind="gpu"), "kind: 'gpu' is no kind"),
        (lambda d: d.update(name="ascend910b1"), "is a built-in target's"),
        (lambda d: d.update(colour="red"), "unknown key 'colour'"),
        (lambda d: d["constants"].update(lanch_us={"value": 1}), "unknown name 'lanch_us'"),
        (lambda d: d["constants"]["l2_mib"].update(unt="MiB"), "unknown key 'unt'"),
        (lambda d: d["constants"]["l2_mib"].update(unit="GB"), r"l2_mib\.unit: 'GB', but"),
        (lambda d: d["constants"]["l2_mib"].pop("source"), "l2_mib: has no source"),
        (lambda d: d["constants"]["l2_mib"].pop("value"), r"l2_mib\.value: is missing"),
        (lambda d: d["constants"].update(l2_mib=192), "l2_mib: is not a mapping"),
        (lambda d: d["constants"]["cube_cores"].update(value=2.5), "cube_cores: 2.5 is not whole"),
        (lambda d: d.update(kernels={"linear": {}}), r"kernels\.linear\.launch_us: is missing"),
    ],
)
def test_damaged_files_name_the_file_and_the_constant(file, edit, message) -> None:
    change(file, edit)
    with pytest.raises(LoweringError, match=rf"mine\.yaml: .*{message}|mine\.yaml: {message}"):
        find_target(file)


@pytest.mark.parametrize("content", ["", "[1, 2]", "just text", "a: [", "a: 1\na: 2"])
def test_files_that_hold_something_else(tmp_path, content) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(content)
    with pytest.raises(LoweringError, match=r"t\.yaml"):
        find_target(path)


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(LoweringError, match="no such file"):
        find_target(str(tmp_path / "none.yaml"))


def test_a_cpu_file_gives_every_kernel(tmp_path) -> None:
    path = tmp_path / "cpu.yaml"
    save_target(CPU, path)
    change(path, lambda data: data["kernels"].pop("int4_linear"))
    with pytest.raises(LoweringError, match=r"kernels\.int4_linear: is missing"):
        find_target(path)


@given(
    name=st.sampled_from(sorted(ASCEND_UNITS)),
    value=st.floats(max_value=0) | st.just(math.nan) | st.just(math.inf) | st.text() | st.none(),
)
def test_no_unsound_target_passes(name, value) -> None:
    sound = find_target("ascend910b2")
    made_up = Constant(value, ASCEND_UNITS[name], "made up")
    broken = replace(sound, constants={**sound.constants, name: made_up})
    with pytest.raises(LoweringError, match=f"it: constants.{name}"):
        check_target(broken, "it")
