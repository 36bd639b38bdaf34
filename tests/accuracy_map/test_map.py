"""A small map of a tiny model on a text and questions written by hand."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from panguq.accuracy_map import worker
from panguq.accuracy_map.folder import FIELDS, MapFolder
from panguq.accuracy_map.job import Job
from panguq.accuracy_map.local import processes_for
from panguq.cli import main
from panguq.tasks import data_folder
from tests.model_folders import TEXT, make_folder, make_model

QUESTIONS = [
    {"query": f"Question: What is {i} and {i}?", "choices": [str(2 * i), "a", "b", "c"], "gold": 0}
    for i in range(1, 9)
]
TASKS = ("wikipedia", "arc_easy")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "wikipedia.txt").write_text(TEXT)
    (folder / "arc_easy.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return folder


@pytest.fixture(autouse=True)
def any_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_folder, "sources", dict)


@pytest.fixture(scope="module")
def arguments(model: Path, data: Path) -> list[str]:
    given = ["--recipes", "w8a16", "w2a16", "--tasks", *TASKS, "--data", str(data), "--limit", "4"]
    return ["map", str(model), *given, "--processes", "1"]


@pytest.fixture(scope="module")
def made(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    out = tmp_path_factory.mktemp("maps") / "map"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_folder, "sources", dict)
        assert main([*arguments, "--out", str(out)]) == 0
    return out


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def test_a_map_lists_every_cell_with_the_same_fields(made: Path) -> None:
    cells = lines(made)
    assert [(c["recipe"], c["task"]) for c in cells] == [
        (recipe, task) for recipe in ("float", "w8a16", "w2a16") for task in TASKS
    ]
    assert all(tuple(cell) == FIELDS for cell in cells)
    assert {c["status"] for c in cells if c["recipe"] == "float"} == {"ok"}
    kl = {c["recipe"]: c["kl"] for c in cells if c["task"] == "arc_easy"}
    assert kl["float"] == 0 < kl["w8a16"] < kl["w2a16"]
    assert list((made / "compiled").iterdir()) == []


def test_what_is_missing_is_made_again_and_nothing_else(
    made: Path, arguments: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "map"
    shutil.copytree(made, copy)
    before = {path.name: path.stat().st_mtime_ns for path in (copy / "cells").iterdir()}
    lost = next(name for name in before if name.startswith("float.wikipedia"))
    cell = json.loads((copy / "cells" / lost).read_text())
    (copy / "cells" / lost).unlink()
    assert main([*arguments, "--out", str(copy)]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in (copy / "cells").iterdir()}
    assert {name for name in before if after[name] != before[name]} == {lost}
    assert json.loads((copy / "cells" / lost).read_text())["value"] == cell["value"]


def test_cells_that_failed_are_made_again_when_asked(
    made: Path, arguments: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "map"
    shutil.copytree(made, copy)
    path = next((copy / "cells").glob("float.wikipedia*"))
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "status": "failed", "reason": "its machine was in use"}))
    before = {cell.name: cell.stat().st_mtime_ns for cell in (copy / "cells").iterdir()}
    assert main([*arguments, "--out", str(copy)]) == 0
    assert json.loads(path.read_text())["status"] == "failed"
    assert main([*arguments, "--out", str(copy), "--retry"]) == 0
    assert json.loads(path.read_text())["value"] == whole["value"]
    after = {cell.name: cell.stat().st_mtime_ns for cell in (copy / "cells").iterdir()}
    assert {name for name in before if after[name] != before[name]} == {path.name}


def test_a_full_disk_is_one_sentence_and_the_map_goes_on(
    made: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "map"
    shutil.copytree(made, copy)
    kept = {path.name: path.read_bytes() for path in (copy / "cells").iterdir()}
    lost = next(name for name in kept if name.startswith("float.arc_easy"))
    (copy / "cells" / lost).unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        assert main([*arguments, "--out", str(copy)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert f"{copy}: cannot be written: File too large" in said and "Traceback" not in said
    left = {path.name: path.read_bytes() for path in (copy / "cells").iterdir()}
    assert left == {name: text for name, text in kept.items() if name != lost}
    assert main([*arguments, "--out", str(copy)]) == 0
    assert (copy / "cells" / lost).exists()


def test_a_requirement_that_is_missed_is_a_sentence_and_status_1(
    made: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rule = "wikipedia <= 100.5%"
    assert main([*arguments, "--out", str(made), "--require", rule]) == 1
    said = capsys.readouterr().err
    assert "w2a16 falls short of wikipedia <= 100.5%: it has" in said and "95 % interval" in said
    assert main([*arguments, "--out", str(made), "--require", "wikipedia <= 1000%"]) == 0


def test_two_maps_compare(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(made, other)
    (worse,) = (other / "cells").glob("w8a16.wikipedia*")
    cell = json.loads(worse.read_text())
    worse.write_text(json.dumps(cell | {"value": 2 * cell["value"], "status": "degraded"}))
    (items,) = (other / "items").glob("w8a16.wikipedia*")
    found = json.loads(items.read_text())["items"]
    items.write_text(json.dumps({"items": [i | {"score": i["score"] + 0.7} for i in found]}))
    assert main(["map", "--compare", str(made), str(other), "--json"]) == 0
    rows = {(r["recipe"], r["task"]): r for r in json.loads(capsys.readouterr().out)}
    assert rows["w8a16", "wikipedia"]["noise"] is False
    assert rows["w2a16", "wikipedia"]["noise"] is True and rows["w2a16", "wikipedia"]["paired"]


def test_the_page_is_one_file_that_asks_no_network(made: Path) -> None:
    (made / "index.html").unlink()
    assert main(["map", "--report", str(made)]) == 0
    page = (made / "index.html").read_text("utf-8")
    assert "default-src 'none'" in page and "http://" not in page.replace("http-equiv", "")
    text = page.split('id="data">')[1].split("</script>")[0]
    found = json.loads(text)
    assert len(found["cells"]) == 6 and "<" not in text
    assert found["cells"][3]["shown"][0]["right"]


def test_the_map_of_another_model_is_refused(
    made: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_folder(tmp_path / "other", make_model(seed=1))
    assert main(["map", str(other), *arguments[2:], "--out", str(made)]) == 1
    assert "is the map of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--tasks", "arc_eazy"], "did you mean arc_easy?"),
        (["--recipes", "w8a17"], "did you mean w8a16?"),
        (["--require", "wikipedia is fine"], "write it as 'humaneval >= 90%'"),
        (["--tasks", "piqa"], "piqa.jsonl: not there"),
        (["--samples", "5"], "several greedy samples are one"),
        (["--thinking", "none", "--tasks", "wikipedia"], "--thinking is of tasks that write code"),
    ],
)
def test_mistakes_are_said_before_any_work(
    change: list[str], said: str, arguments: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "map"), *change]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "map").exists()


def job(recipe: str, task: str = "wikipedia") -> Job:
    text = "" if recipe == "float" else f"name: {recipe}"
    return Job("model", "0" * 64, recipe, text, task, "a protocol", None, windows=0, window=0)


def test_two_workers_share_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell is made once, and never before float's."""
    folder = MapFolder.of_model(tmp_path / "map", "model", "0" * 64)
    tasks = ("wikipedia", "code", "chinese")
    jobs = [job(recipe, task) for recipe in ("float", "a", "b") for task in tasks]
    made: list[str] = []

    def make(folder: MapFolder, job: Job, models: Any, order: int) -> dict[str, Any]:
        assert job.is_float or folder.has(job.float_job)
        made.append(job.name)
        threading.Event().wait(0.01)
        cell = {"name": job.name, "order": order, "recipe": job.recipe, "task": job.task}
        folder.finish(job.name, cell)
        return cell

    monkeypatch.setattr(worker, "make_cell", make)
    threads = [threading.Thread(target=worker.work, args=(folder, jobs)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(j.name for j in jobs)


def test_a_cell_that_kills_its_process_fails_in_the_end(tmp_path: Path) -> None:
    from panguq.accuracy_map.measure import Models, make_cell

    folder = MapFolder.of_model(tmp_path / "map", "model", "0" * 64)
    for _ in range(3):
        folder.begin(job("float").name)
    cell = make_cell(folder, job("float"), Models(folder), 0)
    assert cell["status"] == "failed" and "its process died 3 times" in cell["reason"]


def test_processes_are_as_many_as_memory_holds() -> None:
    jobs = [job(recipe) for recipe in ("float", "a", "b", "c")]
    assert processes_for(jobs, cores=8, free=10 * 2**30, forecast=4 * 2**30) == 2
    assert processes_for(jobs, cores=8, free=2**30, forecast=4 * 2**30) == 1
    assert processes_for(jobs, cores=8, free=2**40, forecast=2**30) == 3
