"""A map whose processes are killed and interrupted ends with the cells of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.model_folders import TEXT, make_folder


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command in a group of its own, so that its workers die with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "panguq.cli", *arguments], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def wait_for_cells(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while len(list((out / "cells").glob("*.json"))) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def values(out: Path) -> dict[tuple[str, str], Any]:
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    return {(cell["recipe"], cell["task"]): cell["value"] for cell in cells}


@pytest.mark.real_model  # minutes, though the model is tiny: six processes start
def test_a_map_of_two_processes_is_killed_and_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    model = make_folder(tmp_path / "llama")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("wikipedia", "chinese", "code"):
        (data / f"{name}.txt").write_text(TEXT * 200)  # a second or more a cell
    given = ["--recipes", "w8a16", "w4a16", "w3a16", "--tasks", "wikipedia", "chinese", "code"]
    arguments = ["map", str(model), *given, "--data", str(data), "--limit", "60"]
    out = tmp_path / "map"
    several = [*arguments, "--processes", "2", "--out", str(out)]

    killed = start(several)
    wait_for_cells(out, 2, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    first = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert 2 <= len(first) < 12

    interrupted = start(several)
    wait_for_cells(out, len(first) + 1, interrupted)
    interrupted.send_signal(signal.SIGINT)
    _, said = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    assert (
        said.splitlines()[-1].startswith("interrupted: finished cells are in")
        and "Traceback" not in said
    )
    assert said.rstrip().endswith("the same command goes on")

    ended = start(several)
    assert ended.wait(timeout=300) == 0, ended.communicate()
    assert {path: path.stat().st_mtime_ns for path in first} == first
    whole = start([*arguments, "--processes", "1", "--out", str(tmp_path / "whole")])
    assert whole.wait(timeout=300) == 0, whole.communicate()
    assert values(out) == values(tmp_path / "whole") and len(values(out)) == 12
    assert not list((out / "compiled").iterdir()) and not list((out / "attempts").iterdir())
