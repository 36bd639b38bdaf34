"""A glob that matches nothing is an error with the nearest names, unless it may."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import panguq
from panguq import recipe as recipe_module
from panguq import registry
from panguq.errors import RecipeError
from panguq.passes.mixed_precision import MixedPrecision
from panguq.passes.pipeline.base import Pass, PassContext, PassResult
from panguq.passes.pipeline.module_globs import check_globs, hint
from panguq.recipe import Recipe
from tests.model_shelf import canonical

QUANTIZE = ["insert-fake-quant", "quantize-weights"]
PATHS = [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("attn.o_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("glob", "meant"),
    [
        ("*.dwon_proj", "'*.down_proj'"),
        ("*.DOWN_PROJ", "'*.down_proj'"),
        ("re:.*down_proj", "'*.down_proj'"),
        ("down_proj", "'*down_proj'"),
        ("model.layers.0", "'model.layers.0.*'"),
        ("model.layers.0.mlp.down_proj.weight", "'model.layers.0.mlp.down_proj'"),
        ("layers.1.mlp.down_proj", "'*layers.1.mlp.down_proj'"),
    ],
)
def test_the_nearest_glob_that_matches_is_named(glob: str, meant: str) -> None:
    assert hint(glob, PATHS).startswith(f"did you mean {meant}")
    assert "the matmuls are model.layers.0.attn.o_proj" in hint(glob, PATHS)


def test_nothing_is_made_up() -> None:
    assert hint("Conv2d", PATHS).startswith("the matmuls are")
    assert hint("Conv2d", []).startswith("it has no matmul")


@pytest.mark.parametrize(
    ("allowed", "refused"), [(False, True), (True, False), (("a.*",), True), (("*.none",), False)]
)
def test_a_glob_may_match_nothing_where_it_is_allowed(allowed: Any, refused: bool) -> None:
    gm, _ = canonical("llama")
    check_globs("this", ["*", "*.down_proj"], gm)
    if not refused:
        check_globs("this", ["*.none"], gm, allowed)
        return
    with pytest.raises(RecipeError, match=r"this '\*\.none' matches no matmul"):
        check_globs("this", ["*.none"], gm, allowed)


def two_linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def compiled(recipe: Any, **options: Any) -> dict[str, str]:
    model = panguq.compile(two_linears(), recipe, example_inputs=(torch.randn(4, 64),), **options)
    return {matmul.name: matmul.scheme for matmul in model.report.matmuls}


def test_compile_refuses_and_allows() -> None:
    recipe = {
        "schemes": {"*": "W8A16", "3": "FLOAT"},
        "passes": ["insert-fake-quant", "quantize-weights"],
    }
    with pytest.raises(RecipeError, match="'3' matches no matmul"):
        compiled(recipe)
    assert set(compiled(recipe, allow_unmatched=True).values()) == {"W8A16"}
    assert set(compiled({**recipe, "allow_unmatched": ["3"]}).values()) == {"W8A16"}


def test_the_globs_of_passes_count_before_any_calibration(monkeypatch: Any) -> None:
    """They are refused with the recipe's own, and not when their pass has its turn."""

    def no_data(*args: object) -> None:
        pytest.fail("calibration began")

    monkeypatch.setattr("panguq.compile_data.CompileData.prepare", no_data)
    passes = [
        {"mixed-precision": {"bits": 6, "keep": ["zero"]}},
        "insert-fake-quant",
        "quantize-weights",
    ]
    recipe = {"schemes": {"*": "W4A16"}, "passes": passes}
    with pytest.raises(RecipeError, match="mixed-precision 'zero' matches no matmul"):
        compiled(recipe)
    plan = panguq.plan(two_linears(), recipe, example_inputs=(torch.randn(4, 64),))
    assert "'zero' matches no matmul" in plan.refusals[0]
    assert MixedPrecision(keep=("zero",)).globs == ("zero",)


@dataclass(frozen=True)
class Spare(Pass):
    """A pass with an ignore list."""

    name: ClassVar[str] = "test-spare"
    ignore: tuple[str, ...] = ()

    @property
    def globs(self) -> tuple[str, ...]:
        return self.ignore

    def run(self, gm: Any, ctx: PassContext) -> PassResult:
        return PassResult()


def test_a_built_in_recipe_is_for_all_models(tmp_path: Path, monkeypatch: Any) -> None:
    """Its own globs may match nothing; those that someone adds to it may not."""
    text = """
        description: for models with experts and for those without
        schemes: {"*": W8A16, "*.experts.*": FLOAT}
        passes: [{test-spare: {ignore: ["*.router"]}}, insert-fake-quant, quantize-weights]
    """
    (tmp_path / "built-in.yaml").write_text(text)
    monkeypatch.setattr(recipe_module.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(registry, "RECIPE_PASSES", (*registry.RECIPE_PASSES, Spare))
    recipe = Recipe.named("built-in")
    assert recipe.allow_unmatched == ("*.experts.*", "*.router")
    assert set(compiled(recipe).values()) == {"W8A16"}
    with pytest.raises(RecipeError, match="'nothing' matches no matmul"):
        compiled(recipe.with_schemes({"nothing": "FLOAT"}))
    with pytest.raises(RecipeError, match="experts"):
        compiled(recipe.with_schemes({"*.experts.*": "W8A16"}))
    with pytest.raises(RecipeError, match="experts"):  # the same text as one's own recipe
        compiled(tmp_path / "built-in.yaml")
