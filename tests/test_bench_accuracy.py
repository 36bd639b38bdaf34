"""The accuracy benchmark on tiny models: rows, tables, and runs that continue."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bench import accuracy, accuracy_row
from bench.accuracy_recipes import BASELINES, DEFAULT, known, recipe_of
from bench.accuracy_row import Task, broken, group_sizes, make_row
from bench.accuracy_table import above, table
from bench.dithered import dither, dither_model
from bench.memory import PeakMemory, process_seconds
from bench.results import Results, markdown_table, write_between_markers
from panguq.recipe import Recipe
from tests.model_shelf import VOCAB, make_model, shared_model

TASK = Task(
    "w4a16", windows=2, calibration_windows=2, sampled_windows=0, dithered=False, lowered=False,
    threads=1,
)  # fmt: skip
PLAIN = {
    "perplexity": 22.0, "float_perplexity": 20.0, "kl": 0.1, "top1": 0.8, "bits_per_weight": 4.25,
    "static_share": 0.0, "dynamic_share": 0.0, "float_share": 1.0, "compile_cpu_seconds": 7.0,
    "peak_anonymous_mib": 900.0, "groups": {"4-bit g64": 3}, "broken": None,
}  # fmt: skip


def tokens(windows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (windows, 32), generator=generator)


def row_of(recipe: Any, **changes: Any) -> dict[str, Any]:
    task = Task(**{**vars(TASK), "recipe": recipe, **changes})
    return make_row(task, shared_model("llama"), tokens(2, 0), tokens(2, 1))


# --- rows ---------------------------------------------------------------------------------------


def test_a_row_has_quality_cost_bits_and_the_groups_really_used() -> None:
    row = row_of("w4a16-plain-rtn", lowered=True)
    assert row["perplexity"] > 0
    assert row["kl"] > 0
    assert 0 < row["top1"] <= 1
    assert 4 < row["bits_per_weight"] < 6
    # Hidden 64 takes groups of 64, down_proj's 96 only those of 32, where 128 were asked for.
    assert row["groups"] == {"4-bit g32": 2, "4-bit g64": 12}
    assert row["peak_resident_mib"] >= row["peak_anonymous_mib"] > 0
    assert row["broken"] is None
    assert row["lowered"]["kl"] != row["kl"]
    assert "lowered" not in row_of("w4a16-plain-rtn")


def test_the_float_row_is_the_model_itself() -> None:
    row = row_of("float")
    assert row["perplexity"] == row["float_perplexity"]
    assert (row["kl"], row["top1"], row["bits_per_weight"]) == (0.0, 1.0, 32.0)


def test_per_channel_weights_and_float_matmuls_are_named() -> None:
    def matmul(scheme: str, **named: Any) -> Any:
        fields = {"gives_logits": False, "is_side": False, "group_size": 64, **named}
        return SimpleNamespace(scheme=scheme, **fields)

    found = group_sizes(
        SimpleNamespace(
            report=SimpleNamespace(
                matmuls=[
                    matmul("W8A8"),
                    matmul("FLOAT"),
                    matmul("W4A16-g64"),
                    matmul("FLOAT", gives_logits=True),
                    matmul("FLOAT", is_side=True),
                ]
            )
        )
    )
    assert found == {"8-bit channel": 1, "float": 1, "4-bit g64": 1}


def test_a_collapsed_model_is_named_with_what_broke() -> None:
    matmuls = [
        SimpleNamespace(name="first", local_sqnr_db=30.0),
        SimpleNamespace(name="second", local_sqnr_db=2.0),
        SimpleNamespace(name="third", local_sqnr_db=1.0),
    ]
    model = SimpleNamespace(report=SimpleNamespace(matmuls=matmuls))
    assert broken(model, {"perplexity": 201.0, "float_perplexity": 20.0}, tokens(1, 0)) == "second"
    assert broken(model, {"perplexity": 199.0, "float_perplexity": 20.0}, tokens(1, 0)) is None


# --- recipes ------------------------------------------------------------------------------------


def test_baselines_are_recipes_and_no_default_row_is_named_twice() -> None:
    for name in BASELINES:
        assert known(name)
        assert Recipe.of(recipe_of(name)).name == name
    assert len(set(DEFAULT)) == len(DEFAULT)
    assert all(known(name) for name in DEFAULT)
    assert not known("w5a5")
    assert known("own/recipe.yaml")


# --- a run --------------------------------------------------------------------------------------


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def run_row(task: Task) -> dict[str, Any]:
        made.append(task.recipe)
        if task.recipe == "w8a16" and made.count("w8a16") == 1:
            raise KeyboardInterrupt
        return {"error": "out of memory"} if task.recipe == "w4a16" else PLAIN

    monkeypatch.setattr(accuracy, "run_row", run_row)
    file = tmp_path / "rows.json"
    arguments = ["x", "--json", str(file), "--recipes", "w8a8", "w4a16", "w5a5", "w8a16"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(KeyboardInterrupt):
        accuracy.main()
    assert list(json.loads(file.read_text())["rows"]) == ["w8a8", "w4a16", "w5a5"]
    accuracy.main()
    # What was finished is not made again; what failed is; an unknown recipe is only reported.
    assert made == ["w8a8", "w4a16", "w8a16", "w4a16", "w8a16"]
    assert json.loads(file.read_text())["rows"]["w5a5"] == {"error": "missing: no such recipe"}


def test_results_of_other_conditions_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    Results(file, {"windows": 16}).put("w8a8", PLAIN)
    assert Results(file, {"windows": 16}).finished("w8a8")
    with pytest.raises(SystemExit, match="other conditions"):
        Results(file, {"windows": 4})


def test_a_process_that_fails_makes_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy.sys, "executable", "false")
    assert "error" in accuracy.run_row(TASK)


def test_the_task_file_spells_all_of_a_task(tmp_path: Path) -> None:
    file = tmp_path / "task.json"
    file.write_text(json.dumps(vars(TASK)))
    assert accuracy_row.Task(**json.loads(file.read_text())) == TASK


# --- the table ----------------------------------------------------------------------------------


def test_the_table_names_what_collapsed_and_what_is_missing() -> None:
    text = table(
        {
            "float": {**PLAIN, "perplexity": 20.0} | {"bits_per_weight": 32.0},
            "w4a16": {**PLAIN, "lowered": {**PLAIN, "perplexity": 25.0}},
            "w4a4": {**PLAIN, "perplexity": math.nan, "broken": "softmax"},
            "w2a16": {**PLAIN, "perplexity": 4000.0, "broken": "layers.0.q"},
            "w1-billm": {"error": "missing: no such recipe"},
        }
    )
    assert "| `w4a16` | 22.000 | +10.00 % (lowered +25.00 %) | 0.1000 | 80.0 % | 4.25 " in text
    assert "| not finite |" in text
    assert "| 200 times |" in text
    assert "- `w2a16` collapsed; the first that broke is `layers.0.q`." in text
    assert text.endswith("- `w1-billm`: missing: no such recipe")


def test_below_ten_times_the_loss_is_in_per_cent() -> None:
    assert above({"perplexity": 199.0, "float_perplexity": 20.0}) == "+895.00 %"


def test_a_table_is_written_between_its_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n<!-- t -->\nold\n<!-- /t -->\nafter\n")
    write_between_markers(page, "t", markdown_table(("a", "b"), iter([["1", "2"]])))
    text = "# A\n<!-- t -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- /t -->\nafter\n"
    assert page.read_text() == text
    with pytest.raises(ValueError, match="has no"):
        write_between_markers(page, "other", "x")
    with pytest.raises(ValueError, match="2 cells"):
        markdown_table(("a", "b"), iter([["1"]]))


# --- the second yardstick and memory ------------------------------------------------------------


def test_dithering_moves_each_weight_by_at_most_half_a_step() -> None:
    generator = torch.Generator().manual_seed(1)
    # On the grid of 16 codes from 0 to 15, so that a step is 1 where a block has both ends.
    weight = torch.randint(0, 16, (8, 64), generator=generator).float()
    weight[:, ::32], weight[:, 1::32] = 0.0, 15.0
    moved = dither(weight, torch.Generator().manual_seed(0)) - weight
    assert moved.abs().max() <= 0.5
    assert 0.24 < moved.abs().mean() < 0.26  # uniform, not only bounded
    assert not dither(torch.full((2, 32), 3.0), generator).ne(3.0).any()
    with pytest.raises(ValueError, match="k = 33"):
        dither(torch.zeros(2, 33), generator)


def test_dithering_a_model_repeats_and_leaves_logits_and_norms_alone() -> None:
    first, second, plain = (make_model("llama") for _ in range(3))
    dither_model(first)
    dither_model(second)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        is_decoder_linear = "layers" in name and a.dim() == 2
        assert torch.equal(a, c) != is_decoder_linear, name


def test_peak_memory_sees_what_was_freed_again() -> None:
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        nn.functional.relu(torch.ones(1))
        del block
    assert peak.resident_mib >= before.resident_mib
    assert peak.resident_mib >= peak.anonymous_mib
    assert 0 < process_seconds() < 1e6
