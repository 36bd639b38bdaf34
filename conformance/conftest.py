"""torch_npu on the pretend device, and golden files."""

from __future__ import annotations

import difflib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"

if importlib.util.find_spec("torch_npu") is None or "LD_LIBRARY_PATH" not in os.environ:
    pytest.exit("torch_npu is not in this environment: run python -m conformance", returncode=2)

warnings.filterwarnings("ignore")
# Before panguq: it adds CPU bodies to the ops that torch_npu has defined.
import torch  # noqa: E402
import torch_npu  # noqa: E402, F401

import panguq.kernels.ascend.vendor.ops  # noqa: E402, F401  (registers the ops)

torch.set_num_threads(1)
torch.npu.init()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write conformance/golden, not compare"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text): the text is that of conformance/golden/<name>.txt."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        if not path.exists():
            pytest.fail(f"{path.name} is missing; make it with --update-golden")
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            lines = (expected.splitlines(), text.splitlines())
            diff = "\n".join(difflib.unified_diff(*lines, "golden", "now", lineterm="", n=0))
            pytest.fail(f"{path.name} differs; if that is meant, --update-golden\n{diff[:5000]}")

    return check
