"""All passes: those that a recipe may list, and those by which a target lowers its graph."""

from __future__ import annotations

from panguq.errors import RecipeError
from panguq.lowering.fit_schemes import FitSchemes
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.lowering.options import DEFAULT_OPTIONS
from panguq.lowering.targets import known_targets
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.awq import Awq
from panguq.passes.billm import BiLlm
from panguq.passes.calibrate import Calibrate
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.decoupled_smoothquant import DecoupledSmoothQuant
from panguq.passes.flatquant import FlatQuant
from panguq.passes.gptaq import Gptaq
from panguq.passes.gptq import Gptq
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.learned_rounding import LearnedRounding
from panguq.passes.mixed_precision import MixedPrecision
from panguq.passes.outliers import Outliers
from panguq.passes.pipeline.base import Pass
from panguq.passes.progressive_rounding import ProgressiveRounding
from panguq.passes.quantize_kv_cache import QuantizeKvCache
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.rotate import Rotate
from panguq.passes.slim_llm import SlimLlm
from panguq.passes.smoothquant import SmoothQuant
from panguq.passes.tune_scales import TuneScales
from panguq.passes.weigh_tokens import WeighTokens

RECIPE_PASSES: tuple[type[Pass], ...] = (
    Canonicalize,
    AssignSchemes,
    Rotate,
    FlatQuant,
    SmoothQuant,
    DecoupledSmoothQuant,
    Awq,
    MixedPrecision,
    WeighTokens,
    Calibrate,
    Outliers,
    InsertFakeQuant,
    QuantizeWeights,
    Gptq,
    Gptaq,
    SlimLlm,
    BiLlm,
    LearnedRounding,
    ProgressiveRounding,
    TuneScales,
    QuantizeKvCache,
)
"""What recipes are made of. Every recipe begins with the first two, which it does not list."""


def add_pass(kind: type[Pass]) -> type[Pass]:
    """Let recipes name a pass of your own, and files that name it be read; a class decorator.

    Raises RecipeError for a name that is taken.
    """
    global RECIPE_PASSES
    if kind.name in {known.name for known in all_passes()}:
        raise RecipeError(f"there is a pass {kind.name!r} already", "give it another name")
    RECIPE_PASSES = (*RECIPE_PASSES, kind)
    return kind


def all_passes() -> tuple[type[Pass], ...]:
    """What recipes are made of and what targets add."""
    before, after = _of_targets("passes_before"), _of_targets("passes_after")
    return tuple(dict.fromkeys((*RECIPE_PASSES, FitSchemes, *before, LowerMatmuls, *after)))


def _of_targets(place: str) -> dict[type[Pass], None]:
    found = (getattr(target, place)(DEFAULT_OPTIONS) for target in known_targets())
    return {type(step): None for passes in found for step in passes}
