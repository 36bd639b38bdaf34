"""Recipes that split outlier channels off, in the form that checkpoint formats can hold."""

from __future__ import annotations

from panguq.passes.outliers import Outliers
from panguq.recipe import Recipe, preset_names
from panguq.serving_form import serving_form, splits_outliers


def test_built_in_recipes_have_built_in_forms() -> None:
    assert serving_form(Recipe.named("w8a8")).name == "w8a8-serving"
    assert serving_form(Recipe.named("w8a8-dynamic")).name == "w8a8-dynamic-serving"
    assert not any(splits_outliers(serving_form(Recipe.named(name))) for name in preset_names())


def test_others_keep_all_but_the_split() -> None:
    recipe = Recipe.named("w8a8-tuned")
    served = serving_form(recipe)
    assert [step.name for step in served.passes] == [
        "rotate", "calibrate", "outliers", "insert-fake-quant", "gptq", "tune-scales",
    ]  # fmt: skip
    (kept,) = (step for step in served.passes if isinstance(step, Outliers))
    assert (kept.treatment, kept.max_share) == ("per-token", 0.3)
    changed = Recipe.named("w8a8").with_schemes({"*.down_proj": "FLOAT"})
    assert "*.down_proj" in serving_form(changed).schemes
    plain = Recipe.named("w4a16")
    assert serving_form(plain) is plain
