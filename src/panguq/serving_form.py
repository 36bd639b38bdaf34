"""The form of a recipe whose result checkpoint formats can hold."""

from __future__ import annotations

from dataclasses import replace

from panguq.passes.outliers import Outliers
from panguq.passes.pipeline.base import Pass
from panguq.recipe import Recipe, preset_names

SHARE = 0.3
"""How much of the weights may get inputs quantized per token, as in the recipe w8a8-serving."""


def splits_outliers(recipe: Recipe) -> bool:
    """Whether the recipe may split channels off into a second matmul, which no checkpoint format
    has a place for."""
    return any(_splits(step) for step in recipe.passes)


def serving_form(recipe: Recipe) -> Recipe:
    """The recipe without passes that split channels off: of a built-in one the built-in
    `NAME-serving` if there is one and nothing was changed; else the same passes without these, and
    with up to `SHARE` of the weights' inputs quantized per token where the recipe has a step that
    does so."""
    if not splits_outliers(recipe):
        return recipe
    served = f"{recipe.name}-serving"
    if served in preset_names() and recipe == Recipe.named(recipe.name):
        return Recipe.named(served)
    passes = tuple(_served(step) for step in recipe.passes if not _splits(step))
    return recipe.model_copy(update={"name": served, "passes": passes})


def _splits(step: Pass) -> bool:
    return isinstance(step, Outliers) and step.treatment == "split"


def _served(step: Pass) -> Pass:
    if isinstance(step, Outliers) and step.treatment == "per-token":
        return replace(step, max_share=max(step.max_share, SHARE))
    return step
