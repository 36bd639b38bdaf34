"""One thread, reproducible Hypothesis, and golden files."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from panguq.kernels.cpu import multiplying

torch.set_num_threads(1)
# Tests compute the same on every machine: in the type that a recipe and an op name.
multiplying.bfloat16_is_faster = multiplying.float32_is_faster = lambda: False
settings.register_profile("panguq", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("panguq")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden instead of comparing"
    )


def compare_with_file(path: Path, text: str) -> None:
    """Fails with a diff unless the file holds exactly this text."""
    if not path.exists():
        pytest.fail(f"{path.name} is missing; make it with pytest --update-golden")
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        lines = (expected.splitlines(), text.splitlines())
        diff = "\n".join(difflib.unified_diff(*lines, "golden", "now", lineterm=""))
        pytest.fail(f"{path.name} differs; if that is meant, pytest --update-golden\n{diff}")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text): the text is that of tests/golden/<name>.txt."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        compare_with_file(path, text)

    return check
