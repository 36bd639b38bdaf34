"""Bounds of dependencies, the releases that are pinned, and the warning of untested ones."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest

from conformance.versions import newest
from conformance.versions import requirements as project
from conformance.versions.environments import Failed, newer
from conformance.versions.requirements import (
    SETUP_EXTRAS,
    Requirement,
    constraints,
    constraints_without,
    requirements,
)
from conformance.versions.resolve import loose_bounds, next_minor
from panguq.extras import OPTIONAL
from panguq.versions import warn_of_untested, within

ROOT = Path(__file__).resolve().parent.parent
EVERY_EXTRA = sorted({extra for _, extra in OPTIONAL.values()} | set(SETUP_EXTRAS))


def test_every_requirement_has_both_bounds() -> None:
    names = [one.name for one in requirements(*EVERY_EXTRA)]
    assert {"torch", "torch_npu", "onnx", "lm-eval", "pytest", "ruff"} <= set(names)
    assert len(names) == len(set(names)), "one package with bounds in two places"


def test_a_requirement_without_an_upper_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '[project]\ndependencies = ["torch>=2"]\n[project.optional-dependencies]\n'
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(project, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="'torch>=2' is not of the form name>=lowest,<below"):
        requirements()


def test_an_extra_of_extras_gives_what_each_of_them_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
[project]
dependencies = ["torch>=2.0,<3.0"]
[project.optional-dependencies]
a = ["x>=1.0,<2.0"]
b = ["panguq[a]", "y>=1.5,<1.6", "torch>=2.0,<3.0"]
"""
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(project, "ROOT", tmp_path)
    found = requirements("b")
    assert [one.name for one in found] == ["torch", "y", "x"]
    assert found[1] == Requirement("y", "1.5", "1.6")
    assert found[1].allows("1.5.3") and not found[1].allows("1.6") and not found[1].allows("1.4.9")


def test_upper_bounds_are_the_minor_releases_that_are_pinned() -> None:
    """What `make setup` installs is the newest that pyproject.toml allows."""
    assert loose_bounds(constraints()) == []
    transformers = next(one for one in requirements() if one.name == "transformers")
    assert loose_bounds({**constraints(), "transformers": "5.23.0"}) == [transformers]


def test_the_release_after_the_tested_ones() -> None:
    assert [str(next_minor(one)) for one in ("2.13.0", "6", "0.2.3")] == ["2.14", "6.1", "0.3"]


def test_constraints_pin_what_setup_installs_and_no_torch_of_one_platform() -> None:
    pins = constraints()
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert pins["torch"] and "+" not in text and "panguq==" not in text
    assert "torch==" not in constraints_without(["torch"]) and len(pins) > 50
    for one in requirements(*SETUP_EXTRAS):
        assert one.allows(pins[project.canonicalize_name(one.name)]), one


def test_releases_are_compared_as_numbers() -> None:
    found, pins = {"a": "1.10.0", "b": "2.0", "c": "1"}, {"a": "1.9.0", "b": "2.0"}
    assert newer(found, pins) == ["a", "c"]


@pytest.mark.parametrize(
    ("release", "allowed"),
    [
        ("5.20", True),
        ("5.20.0", True),
        ("5.24.9", True),
        ("5.24.0+cpu", True),
        ("5.25.0", False),
        ("5.25.0.dev0", False),
        ("5.100", False),
        ("6", False),
        ("5.19.9", False),
    ],
)
def test_within_a_bound(release: str, allowed: bool) -> None:
    assert within(release, "<5.25,>=5.20") is allowed


@pytest.mark.parametrize("name", ["transformers", "torch"])
@pytest.mark.parametrize("release", ["99.0.0", "0.1"])
def test_an_untested_release_is_warned_of(
    name: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: release if n == name else real(n))
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch<2.99,>=2.1", "transformers<6,>=5"])
    with pytest.warns(UserWarning) as caught:
        warn_of_untested()
    assert len(caught) == 1
    assert str(caught[0].message).startswith(
        f"{name} {release} is installed, and panguq was tested"
    )


def test_tested_releases_are_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [f"{one.name}<{one.below},>={one.lowest}" for one in requirements()]
    monkeypatch.setattr(metadata, "requires", lambda _: bounds)
    monkeypatch.setattr(metadata, "version", lambda name: constraints()[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested()


def test_the_warning_comes_once_from_an_import_and_imports_nothing() -> None:
    code = """
from importlib import metadata
real = metadata.version
metadata.version = lambda name: "99.0" if name == "transformers" else real(name)
import sys, panguq, panguq.recipe
print("transformers" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr.count("transformers 99.0 is installed") == 1
    assert done.stdout.strip() == "False"


def test_what_breaks_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One release at a time is put back; a test is broken by the one without which it passes."""
    found, pins = {"numpy": "3.0", "transformers": "6.0"}, {"numpy": "2.4", "transformers": "5.24"}
    there = dict(found)

    def put_in(python: Path, *arguments: str) -> None:
        name, release = arguments[-1].split("==")
        there[name] = release

    def failing(python: Path, tests: Sequence[str]) -> list[str]:
        return [one for one in tests if one == "always" or there["transformers"] == "6.0"]

    monkeypatch.setattr(newest, "pip_install", put_in)
    monkeypatch.setattr(newest, "failing_tests", failing)
    newest.blame(Path("python"), ["beams", "always"], ["numpy", "transformers"], found, pins)
    assert capsys.readouterr().out.splitlines() == [
        "transformers 6.0 breaks beams: with 5.24 it passes",
        "always fails, whichever single release is put back",
    ]
    assert there == found, "each is put in again"


def test_failing_tests_are_named(tmp_path: Path) -> None:
    file = tmp_path / "test_two.py"
    file.write_text("def test_good(): pass\ndef test_bad(): assert 0\n", encoding="utf-8")
    [name] = newest.failing_tests(Path(sys.executable), [str(file)])
    assert name.endswith("test_two.py::test_bad")
    assert newest.failing_tests(Path(sys.executable), [f"{file}::test_good"]) == []
    with pytest.raises(Failed, match="pytest ended with 4"):
        newest.failing_tests(Path(sys.executable), [str(tmp_path / "none.py")])
