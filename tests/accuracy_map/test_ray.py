"""The map on a real Ray cluster of this machine, one of whose two workers is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from panguq.accuracy_map.job import Job
from panguq.accuracy_map.on_ray import resources
from panguq.cli import main
from panguq.errors import InputError
from tests.model_folders import TEXT, make_folder


@pytest.fixture
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def kill_first(attempts: Path, killed: list[int]) -> None:
    """Kill the first process that begins a cell of a recipe."""
    deadline = time.monotonic() + 500
    while not killed and time.monotonic() < deadline:
        for path in attempts.glob("w*") if attempts.exists() else []:
            with suppress(OSError, ValueError):
                killed.append(int(path.read_text().split()[0]))
                os.kill(killed[-1], signal.SIGKILL)
                return
        time.sleep(0.02)


@pytest.mark.real_model  # minutes, though the model is tiny: Ray starts a cluster
def test_a_cell_whose_worker_died_is_made_again(cluster: None, tmp_path: Path) -> None:
    model = make_folder(tmp_path / "llama")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/wikipedia.txt").write_text(TEXT)
    out = tmp_path / "map"
    killed: list[int] = []
    watcher = threading.Thread(target=kill_first, args=(out / "attempts", killed))
    watcher.start()
    given = ["--recipes", "w8a16", "w4a16", "--tasks", "wikipedia", "--data", tmp_path / "data"]
    arguments = ["map", model, *given, "--limit", "4", "--out", out, "--on", "ray"]
    assert main([str(argument) for argument in arguments]) == 0
    watcher.join()
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert killed and killed[0] != os.getpid()
    assert [(c["recipe"], c["value"] is not None) for c in cells] == [
        ("float", True), ("w8a16", True), ("w4a16", True),
    ]  # fmt: skip
    assert list((out / "attempts").iterdir()) == []


def job(target: str = "cpu") -> Job:
    return Job("model", "0" * 64, "a", "name: a", "wikipedia", "p", None, target=target)


def test_a_cell_asks_for_what_the_plan_forecasts() -> None:
    cluster = {"CPU": 4.0, "memory": 8e9, "NPU": 2.0}
    assert resources([job()], cluster, 2**30) == {"num_cpus": 1, "memory": 2**30}
    ascend = [job("ascend910b1")]
    assert resources(ascend, cluster, 2**30)["resources"] == {"NPU": 1}
    assert "resources" not in resources(ascend, {"CPU": 4.0}, 2**30)


def test_a_cluster_that_is_too_small_is_refused() -> None:
    with pytest.raises(InputError, match="a cell takes about 4096 MiB, the cluster has 953 MiB"):
        resources([job()], {"memory": 1e9}, 2**32)
