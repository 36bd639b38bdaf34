"""A feature whose package is not installed says which extra brings it, in one sentence."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from conformance.versions.requirements import requirements
from panguq.errors import InputError, LoweringError
from panguq.extras import OPTIONAL, missing, require

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_FOLDERS = ("src/panguq", "ir", "passes", "lowering", "kernels", "recipes")
# Import names of what every installation has: dependencies, and what those cannot do without.
ALWAYS_THERE = {one.name for one in requirements()} | {
    "yaml",
    "tokenizers",
    "jinja2",
    "pydantic_core",
}


@pytest.mark.parametrize("module", sorted(OPTIONAL))
def test_the_named_extra_brings_the_package(module: str) -> None:
    package, extra = OPTIONAL[module]
    assert package in {one.name for one in requirements(extra)}


def test_a_package_that_is_there_is_not_missed() -> None:
    require("torch", "anything")


def test_the_error_says_what_needs_it_and_what_else_can_be_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(InputError) as caught:
        require("gguf", "reading GGUF files", "give the model as safetensors")
    assert caught.value.message == (
        "reading GGUF files needs the package gguf, which is not installed"
    )
    assert caught.value.hint == "pip install 'panguq[gguf]', or give the model as safetensors"


def test_an_error_can_be_of_the_kind_that_callers_wait_for() -> None:
    error = missing("torch_npu", "running on an NPU", kind=LoweringError)
    assert isinstance(error, LoweringError) and error.hint == "pip install 'panguq[npu]'"


def imported_modules(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {one.name.split(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_nothing_else_is_imported_that_a_plain_installation_lacks() -> None:
    """A package of an extra is imported behind `require`, and any other one belongs to none."""
    files = [file for folder in INSTALLED_FOLDERS for file in (ROOT / folder).rglob("*.py")]
    known = {*sys.stdlib_module_names, *ALWAYS_THERE, *OPTIONAL, "panguq"}
    unknown = {f"{file.name}: {name}" for file in files for name in imported_modules(file) - known}
    assert not unknown, f"a dependency, or an extra and a line in panguq.extras: {unknown}"
