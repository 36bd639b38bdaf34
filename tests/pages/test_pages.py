"""Pages in a real browser: nothing on the console, a click opens what is behind a cell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from panguq.accuracy_map.folder import MapFolder
from panguq.accuracy_map.job import Job
from panguq.pages.dump_page import layer_grid
from panguq.pages.map_page import write_map_page
from panguq.pages.page import embedded
from panguq.pages.plots import pareto

CHROMIUM = shutil.which("chromium")
HOSTILE = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"
CLICK = """<script>
document.querySelectorAll("td.cell")[1].click();
const said = () => details.open ? "opened: " + details.querySelector("h2").textContent : "closed";
setTimeout(() => { document.title = said(); }, 200);
</script></body>"""


def cell(recipe: str, order: int, **more: Any) -> dict[str, Any]:
    """A finished cell of a map that is written by hand."""
    name = f"{recipe}.humaneval.{order}"
    figures = {"value": 0.5, "stderr": 0.1, "float_value": 0.5, "difference": 0.0, "low": -0.1,
               "high": 0.1, "p": 1.0, "right_to_wrong": 1, "wrong_to_right": 1, "kl": 0.01,
               "top1": 0.9, "items": 4, "seconds": 1.0, "peak_mib": 10, "bits_per_weight": 8.0,
               "tokens_mean": 40.0, "tokens_p90": 60.0, "cut_off": 0.0, "loops": 0.0,
               "ties": 0}  # fmt: skip
    about = {"name": name, "order": order, "model": "m", "recipe": recipe, "task": "humaneval",
             "protocol": "by hand", "seed": 0, "limit": None, "kind": "code", "status": "ok",
             "reason": ""}  # fmt: skip
    return {**about, **figures, **more}


@pytest.fixture
def folder(tmp_path: Path) -> MapFolder:
    made = MapFolder.of_model(tmp_path / "map", "model", "0" * 64)
    item = {"prompt": "def f():", "answer": HOSTILE, "right": "pass", "score": 0.0, "note": ""}
    for order, recipe in enumerate(("float", "w8a8", "w4a16")):
        bits = {"bits_per_weight": 32.0 / 2**order, "kl": 0.01 * order}
        found = cell(recipe, order, **bits)
        made.finish(found["name"], found, [item])
    write_map_page(made)
    return made


def test_the_answers_of_a_model_are_text(folder: MapFolder) -> None:
    page = (folder.path / "index.html").read_text("utf-8")
    assert HOSTILE not in page and page.count("<script") == 3
    assert "<" not in embedded({"answer": HOSTILE})


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_click_opens_the_cell_and_the_console_is_silent(folder: MapFolder) -> None:
    page = folder.path / "clicked.html"
    text = (folder.path / "index.html").read_text("utf-8")
    page.write_text(text.replace("</body>", CLICK), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>opened: w8a8 · humaneval</title>" in done.stdout
    assert "def f():" in done.stdout and "taken over'</script>" not in done.stdout


def test_the_front_holds_what_nothing_beats() -> None:
    points = {"a": (4.0, 0.3), "b": (4.2, 0.4), "c": (8.0, 0.1), "d": (3.0, 0.9)}
    assert pareto(points, lower_is_better=True) == ["d", "a", "c"]
    assert pareto(points, lower_is_better=False) == ["d"]


def test_matmuls_make_a_grid_of_layers() -> None:
    names = {"model.layers.0.mlp.up:linear": 1.0, "model.layers.1.mlp.up:linear": 2.0, "head": 3.0}
    found = layer_grid(names)
    assert found["layers"] == ["0", "1", "-"]
    assert found["kinds"]["mlp.up"]["1"] == "model.layers.1.mlp.up:linear"


def test_a_job_is_named_by_all_that_changes_its_figures() -> None:
    one = Job("m", "0" * 64, "w8a8", "name: w8a8", "piqa", "p", None)
    names = {one.name, *(Job(**{**one.as_json(), **change}).name for change in (
        {"seed": 1}, {"limit": 3}, {"protocol": "q"}, {"calibration_sha256": "c"},
        {"recipe_text": "name: other"}, {"model_sha256": "1" * 64}, {"target": "ascend910b1"},
    ))}  # fmt: skip
    assert len(names) == 8
    assert Job(**{**one.as_json(), "batch": 1, "command": "another"}).name == one.name
