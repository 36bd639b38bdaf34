"""A compile that is killed goes on where it stopped, with the bits of one that was not killed."""

import errno
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from panguq import tracing
from panguq.cli import main
from panguq.formats.own import storage
from panguq.passes.pipeline import runner
from panguq.tensors import work_folder
from panguq.tensors.work_folder import WorkFolder
from tests.families.models import make
from tests.model_folders import TEXT, make_folder, make_model

TIMES = {"report.json", "manifest.json"}  # the report tells seconds, the manifest its hash
GPTQ = """
name: some-gptq
schemes: {"*": W4A16}
passes: [insert-fake-quant, gptq, {tune-scales: {epochs: 3}}]
"""
SEARCHES = """
name: two-searches
schemes: {"*": W8A8_DYNAMIC}
passes: [{smoothquant: {alpha: search}}, awq, insert-fake-quant, quantize-weights]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_folder(folder / "model", make_model(num_hidden_layers=1))
    (folder / "text.txt").write_text(TEXT)
    (folder / "gptq.yaml").write_text(GPTQ)
    (folder / "searches.yaml").write_text(SEARCHES)
    return folder


def recipe_of(place: Path, name: str) -> str:
    file = place / f"{name}.yaml"
    return str(file) if file.exists() else name


def compile_model(place: Path, recipe: str, out: Path, *more: str) -> int:
    command = ["compile", str(place / "model"), "--recipe", recipe_of(place, recipe), "--out"]
    text = ["--calibration", str(place / "text.txt"), "--windows", "2", "--window", "32"]
    return main([*command, str(out), *text, *more])


def killed(run: Callable[[], object]) -> bool:
    """Run in a forked process; whether SIGKILL ended it."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die_at(count: int, owner: object, name: str, before: bool = True) -> None:
    """Let the count-th call of this function, counted from 1, be the process's last."""
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def stop_after(count: int, owner: object, name: str) -> None:
    """Let this process stop, to be continued, once this function was called so many times."""
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    setattr(owner, name, counted)


def hashes(folder: Path) -> dict[str, str]:
    kept = (path for path in sorted(folder.iterdir()) if path.name not in TIMES)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Callable[[str], dict[str, str]]:
    known: dict[str, dict[str, str]] = {}

    def of(recipe: str) -> dict[str, str]:
        if recipe not in known:
            out = place / f"{recipe}-whole"
            assert compile_model(place, recipe, out) == 0
            known[recipe] = hashes(out)
        return known[recipe]

    return of


@pytest.mark.parametrize(
    ("recipe", "owner", "name", "count", "before"),
    [
        ("w4a16", WorkFolder, "keep", 1, True),  # the calibration is done, and lost
        ("w4a16", work_folder, "write_tensors", 6, True),  # some weights are quantized
        ("w4a16", storage, "_write_shard", 1, False),  # the result is half saved
        ("w8a8-dynamic", WorkFolder, "keep", 7, False),  # scales are folded, and codes chosen
        ("searches", WorkFolder, "keep", 2, False),  # some sites have a scale
        ("searches", WorkFolder, "keep", 6, False),  # the second search has begun
        ("gptq", WorkFolder, "keep", 4, False),  # in the middle of a sweep
        ("gptq", WorkFolder, "keep", 6, False),  # some epochs of tuning are done
    ],
)
def test_the_bits_are_those_of_an_uninterrupted_compile(
    place, uninterrupted, tmp_path, monkeypatch, recipe, owner, name, count, before
) -> None:
    out = tmp_path / "out"

    def run() -> None:
        die_at(count, owner, name, before)
        compile_model(place, recipe, out)

    assert killed(run)
    assert not out.exists()
    work = tmp_path / ".out.work"
    kept = len(list(work.rglob("facts.json")))
    found = []
    read = WorkFolder.find

    def counted(self, unit):
        result = read(self, unit)
        found.extend([unit] if result else [])
        return result

    monkeypatch.setattr(WorkFolder, "find", counted)
    assert compile_model(place, recipe, out) == 0
    assert hashes(out) == uninterrupted(recipe)
    assert len(found) == kept  # nothing that was finished is computed again
    assert not work.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_recipe_starts_anew(place, uninterrupted, tmp_path, caplog) -> None:
    out = tmp_path / "out"

    def run() -> None:
        die_at(5, WorkFolder, "keep")
        compile_model(place, "w4a16", out)

    assert killed(run)
    assert compile_model(place, "w8a8-dynamic", out) == 0
    assert "starts anew; different: recipe" in caplog.text
    assert hashes(out) == uninterrupted("w8a8-dynamic")


def test_other_weights_start_anew(tmp_path, caplog) -> None:
    """One number of the checkpoint differs, where the key looks."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    make_folder(model, make_model(num_hidden_layers=1))
    (tmp_path / "text.txt").write_text(TEXT)

    def run() -> None:
        die_at(5, WorkFolder, "keep")
        compile_model(tmp_path, "w4a16", tmp_path / "out")

    assert killed(run)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert compile_model(tmp_path, "w4a16", tmp_path / "out") == 0
    assert "starts anew; different: model" in caplog.text


def test_a_chosen_folder_is_used_and_removed(place, tmp_path) -> None:
    work = tmp_path / "elsewhere" / "work"

    def run() -> None:
        die_at(3, WorkFolder, "keep")
        compile_model(place, "w4a16", tmp_path / "out", "--work-dir", str(work))

    assert killed(run)
    assert len(list(work.rglob("facts.json"))) == 2
    assert compile_model(place, "w4a16", tmp_path / "out", "--work-dir", str(work)) == 0
    assert not work.exists()


def test_a_compile_that_is_refused_at_once_leaves_nothing(place, tmp_path, capsys) -> None:
    """No part was finished, so there is nothing to go on from."""
    extra = ("--scheme", "*.nothing=FLOAT")
    assert compile_model(place, "w4a16", tmp_path / "out", *extra) == 1
    assert "matches no matmul" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_end_keeps_the_finished_parts(
    place, tmp_path, monkeypatch, capsys, uninterrupted
) -> None:
    """The very last step fails; the same command needs only that step again."""
    whole = uninterrupted("w4a16")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write_shard", full)
        assert compile_model(place, "w4a16", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert f"the same command goes on from them in {tmp_path / '.out.work'}" in said
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    monkeypatch.setattr(WorkFolder, "keep", lambda self, unit, done: pytest.fail(f"{unit} again"))
    assert compile_model(place, "w4a16", tmp_path / "out") == 0
    assert hashes(tmp_path / "out") == whole


def test_a_second_compile_into_the_same_place_touches_nothing(place, tmp_path, capsys) -> None:
    """While the first one stands still; its own folder for parts does not help the second."""
    work = tmp_path / ".out.work"
    first = os.fork()
    if first == 0:
        try:
            stop_after(4, WorkFolder, "keep")
            os._exit(compile_model(place, "w4a16", tmp_path / "out"))
        finally:
            os._exit(99)
    os.waitpid(first, os.WUNTRACED)
    before = sorted(work.rglob("*"))
    assert len([path for path in before if path.name == "facts.json"]) == 4
    for more in ([], ["--work-dir", str(tmp_path / "elsewhere")]):
        assert compile_model(place, "w4a16", tmp_path / "out", *more) == 1
        assert "in use by another compile" in capsys.readouterr().err
    assert sorted(work.rglob("*")) == before
    assert not (tmp_path / "elsewhere").exists()
    os.kill(first, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mixture_killed_between_two_experts(tmp_path, monkeypatch) -> None:
    place = tmp_path / "mixture"
    make_folder(place / "model", make("qwen3_moe", num_hidden_layers=1))
    (place / "text.txt").write_text(TEXT)
    (place / "gptq.yaml").write_text(GPTQ.replace(", {tune-scales: {epochs: 3}}", ""))
    assert compile_model(place, "gptq", tmp_path / "whole") == 0

    def run() -> None:
        die_at(10, WorkFolder, "keep")
        compile_model(place, "gptq", tmp_path / "out")

    assert killed(run)
    kept = {path.parent.name for path in (tmp_path / ".out.work").rglob("facts.json")}
    experts = "model.layers.0.mlp.experts.{}_proj%3Aexpert_linear.{}"
    assert experts.format("gate_up", 3) in kept and experts.format("down", 0) in kept
    assert experts.format("down", 3) not in kept
    again: list[str] = []
    for owner, check in ((tracing, "check_causal_lm"), (runner, "prove_whole")):
        monkeypatch.setattr(owner, check, lambda *_, check=check: again.append(check) or 0.0)
    assert compile_model(place, "gptq", tmp_path / "out") == 0
    assert again == []  # the killed run has passed these checks, which read all weights
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
