"""Which recipe to take: what is weighed, and what is chosen of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from panguq.cli import main
from panguq.planning.advice import RecipeRow, _choose
from panguq.planning.losses import losses
from panguq.recipe import preset_names
from tests.config_folders import PANGU, config_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    config = PANGU | {"num_hidden_layers": 1, "max_position_embeddings": 4096}
    return config_folder(tmp_path_factory.mktemp("pangu"), config)


def test_every_recipe_is_weighed(folder, capsys) -> None:
    asked = ["advise", str(folder), "--target", "ascend910b2", "--server", "vllm-ascend==0.23"]
    assert main([*asked, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {row["recipe"]: row for row in data["recipes"]}
    assert tuple(sorted(rows)) == preset_names()
    assert rows["w8a8-dynamic"]["takes"] and not rows["w4a16"]["takes"]
    assert "no dense W4A16" in rows["w4a16"]["refused"]
    assert rows["w8a8-dynamic"]["weights_mib"] < rows["float"]["weights_mib"]
    kv8, plain = (rows[name]["kv_cache_mib"] for name in ("w8a8-dynamic-kv8", "w8a8-dynamic"))
    assert kv8 == plain / 2
    assert rows["float"]["gain_over_float"] == 1.0
    # the host rules a model of one layer, so nothing is faster
    assert data["recommendation"]["recipe"] == "none"
    notes = " ".join(data["notes"])
    assert "nobody measured the launch path of vllm-ascend 0.23" in notes
    assert "SmolLM2-135M, a far smaller model" in notes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--server", "vllm-asend"], "unknown server"),
        (["--target", "cpu"], "advice is for Ascend targets only"),
        (["--mode", "fast"], "graph or eager"),
        (["--memory", "0GiB"], "no size of a card"),
    ],
)
def test_what_cannot_be_answered(folder, capsys, options, said) -> None:
    assert main(["advise", str(folder), *options]) == 1
    assert said in capsys.readouterr().err


def row(name: str, **values) -> RecipeRow:
    losses_of = values.pop("loss", None)
    known = losses()["w8a8-dynamic"][:1]
    made = () if losses_of is None else (replace(known[0], perplexity_percent=losses_of),)
    usual = {"takes": True, "refused": "", "fits": True, "weights_mib": 1024.0, "total_mib": 2048.0}
    return RecipeRow(name, ("W8A8",), losses=made, **(usual | values))


FLOAT = row("float", gain_over_float=1.0, weights_mib=2048.0)


@pytest.mark.parametrize(
    ("rows", "recipe", "said"),
    [
        ([row("a", loss=1.0, gain_over_float=1.0)], "none", "for memory alone, a saves 1.0 GiB"),
        ([row("a", loss=1.0, gain_over_float=0.8)], "none", "and takes 25% longer"),
        (
            [
                row("a", loss=1.0, gain_over_float=1.3),
                row("b", loss=0.5, gain_over_float=1.29),
                row("c", loss=0.1, gain_over_float=1.1),
            ],
            "b",
            "1.29 times as fast",
        ),
        ([row("a", loss=1.0, gain_over_float=1.3, takes=False)], "none", "faster"),
        ([row("a", loss=50.0, gain_over_float=1.3)], "none", "faster"),
        ([row("a", gain_over_float=1.3)], "none", "faster"),  # its loss is not known
        ([row("a", loss=1.0, gain_over_float=1.3, fits=False)], "none", "faster"),
    ],
)
def test_the_choice_where_the_float_model_fits(rows, recipe, said) -> None:
    found, reason = _choose([FLOAT, *rows], no_class="")
    assert found == recipe and said in reason


def test_the_choice_where_it_does_not_fit() -> None:
    large = replace(FLOAT, fits=False)
    rows = [row("a", loss=9.0, gain_over_float=2.0), row("b", loss=1.0, gain_over_float=0.5)]
    assert _choose([large, *rows], no_class="")[0] == "b"
    none = [replace(entry, fits=False) for entry in rows]
    assert _choose([large, *none], no_class="") == (
        "none",
        "neither the float model nor any recipe that the server takes fits the card",
    )
    assert _choose([FLOAT, *rows], no_class="it has no class")[0] == "none"


def test_losses_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for recipe, found in losses().items():
        lines = [line for line in page.splitlines() if line.startswith(f"| `{recipe}` |")]
        cells = [line.split(" | ") for line in lines if "CPU" not in line][: len(found)]
        assert [float(cell[3]) for cell in cells] == [loss.kl for loss in found], recipe
        for cell, loss in zip(cells, found, strict=True):
            if "%" in cell[2]:
                assert float(cell[2].strip("+ %")) == pytest.approx(
                    loss.perplexity_percent, abs=0.02
                )
