"""The dry run: what a compile would do, without touching weights or data."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from panguq.data.calibration import WINDOW, WINDOWS
from panguq.data.encoder_inputs import lacks_data, needs_data
from panguq.errors import LoweringError, PanguqError, RecipeError
from panguq.forecast.forecast import Request, forecast
from panguq.forecast.graph import canonical_graph
from panguq.forecast.launch_paths import LAUNCH_PATHS
from panguq.forecast.text import as_json
from panguq.ir.edit import label, module_path
from panguq.ir.encoder import Examples
from panguq.ir.expert_groups import paths_of, schemes_of
from panguq.ir.interface import Interface
from panguq.ir.quant_spec import Scheme
from panguq.ir.views import ExpertLinear, Linear
from panguq.lowering.choice import Choice
from panguq.lowering.lower_matmuls import Choices
from panguq.lowering.problem import FLOAT_BYTES, Dtype
from panguq.lowering.stages import default_dtype
from panguq.lowering.target import Target
from panguq.lowering.targets import find_target
from panguq.models.hub_names import hub_names
from panguq.models.wrappers import language_model_of
from panguq.passes.assign_schemes import AssignSchemes, gives_logits
from panguq.passes.pipeline.base import PassContext, PassResult, matmuls
from panguq.passes.pipeline.module_globs import check_globs, matches
from panguq.planning.costs import (
    compile_seconds,
    disk_bytes,
    peak_bytes,
    temporary_bytes,
    weight_bytes,
)
from panguq.planning.report import MatmulPlan, Plan
from panguq.recipe import Recipe
from panguq.report.left_in_float import left_in_float
from panguq.report.smoothing import nowhere_to_smooth, smoothing_sites
from panguq.schedule import Schedule
from panguq.server_models import expert_notes
from panguq.tensors.weight_store import WeightStore

__all__ = ["Plan", "plan"]

logger = logging.getLogger("panguq")


def plan(
    model: nn.Module | str | Path,
    recipe: str | Path | Recipe,
    *,
    target: str = "cpu",
    example_inputs: Examples = None,
    dtype: torch.dtype | None = None,
    windows: int = WINDOWS,
    window: int = WINDOW,
    calibrated: bool = True,
) -> Plan:
    """What `compile` would do with this model: schemes, kernels, predicted cost, refusals.

    model: as for `compile`, or the path of a local model folder, of which only the config is read.
    windows, window: how much calibration data there would be, for the predicted time and memory.
    calibrated: whether any would be given; where none is and the model writes none of its own, a
        recipe that needs data is refused.

    The checks are those that `compile` makes before any calibration; what they refuse is listed in
    `Plan.refusals` instead of raised. Raises RecipeError for a recipe that cannot be read,
    LoweringError for an unknown target, TraceError and InputError for a model that has no graph.
    """
    recipe = Recipe.of(recipe)
    schedule = Schedule.of(recipe, target)
    from_folder = isinstance(model, str | Path)
    if isinstance(model, str | Path):
        from panguq.models.hf import skeleton

        model = skeleton(model)
    source: Any = language_model_of(model)
    merged = hub_names(source).merged if from_folder else {}
    started = time.perf_counter()
    dtype = dtype or default_dtype(target)
    globs = [*recipe.schemes, *(glob for step in recipe.passes for glob in step.globs)]
    gm, interface = canonical_graph(source, example_inputs, dtype, globs)
    ctx = PassContext(interface, WeightStore(), allow_unmatched=recipe.allow_unmatched)
    trace_seconds = time.perf_counter() - started

    refusals = _order_refusals(schedule)
    if not calibrated and schedule.needs_calibration and lacks_data(source, example_inputs):
        refusals.append(_with_hint(needs_data(source)))
    assigned, refused = _assign(gm, ctx, recipe)
    results = [assigned]
    notes = {skip.node: skip.reason for skip in assigned.skipped}
    refusals += [*refused, *_glob_refusals(gm, recipe)]
    unread = _format_refusals(schedule)
    refusals += unread
    for step in () if unread else schedule.fitting:
        try:
            results.append(step.run(gm, ctx))
            notes |= {skip.node: skip.reason for skip in results[-1].skipped}
        except LoweringError as error:
            refusals.append(_with_hint(error))
    refusals += _matmul_refusals(schedule, gm)
    rows = []
    choices = Choices(find_target(target), recipe.precision, recipe.ascend)
    for node, scheme, members in [(n, s, m) for n in matmuls(gm) for s, m in schemes_of(n).items()]:
        try:
            choice = choices.choose(node, scheme, members)
            row = describe_matmul(node, scheme, members, choice, notes.get(label(node), ""))
        except LoweringError as error:
            said_once = f"{label(node)}: {error.message}"
            if not unread and said_once not in refusals:  # which says it once for all of them
                refusals.append(said_once)
            row = describe_matmul(node, scheme, members, None, f"refused: {error.message}")
        rows.append(row)
    sites, blocked = smoothing_sites(gm, interface, schedule.passes)
    said = [*getattr(source, "panguq_left_out", ()), *gm.meta.get("trace_warnings", ())]
    said += left_in_float(gm, _assign_pass(recipe), results)
    said += nowhere_to_smooth(sites, interface)
    counted: dict[str, int] = getattr(source, "panguq_only_counted", {})
    counted_bytes = sum(counted.values()) * getattr(torch, interface.float_dtype).itemsize
    seconds = compile_seconds(gm, schedule.passes, windows * window)
    config = source.config if isinstance(source, PreTrainedModel) else None
    said += expert_notes({} if config is None else config.to_dict())
    return Plan(
        recipe=recipe.name,
        model_type=getattr(config, "model_type", None),
        architectures=(type(source).__name__,),
        target=target,
        passes=tuple(step.name for step in schedule.passes),
        inputs={name: list(interface.input_shapes[name]) for name in interface.inputs},
        nodes=len(gm.graph.nodes),
        matmuls=tuple(rows),
        smoothing_sites=sites,
        smoothing_blocked=blocked,
        refusals=tuple(refusals),
        warnings=() if refused else tuple(said),
        only_counted=counted,
        calibration_tokens=windows * window,
        weight_bytes=weight_bytes(gm) + counted_bytes,
        disk_bytes=disk_bytes(gm) + counted_bytes,
        temporary_bytes=temporary_bytes(gm, schedule.passes, merged),
        peak_bytes=peak_bytes(gm, windows, window, schedule.passes),
        trace_seconds=round(trace_seconds, 1),
        compile_seconds=round(trace_seconds + seconds, 1),
        forecast=_forecast(gm, interface, find_target(target), recipe, config),
    )


def _forecast(
    gm: fx.GraphModule, interface: Interface, target: Target, recipe: Recipe, config: Any
) -> dict[str, Any] | None:
    """What a request takes on the server whose launch path was measured last; None for a target, a
    model or a scheme of which none is predicted."""
    path, dtype = LAUNCH_PATHS[0], interface.float_dtype
    if target.peaks is None or interface.kind != "causal_lm" or dtype not in FLOAT_BYTES:
        return None
    try:
        found = forecast(
            gm,
            interface,
            target,
            path,
            Request(),
            scheme=recipe.name,
            dtype=cast(Dtype, dtype),
            config=config,
        )
    except PanguqError:  # refused kernels are in the plan's refusals
        return None
    return as_json(found)


def _order_refusals(schedule: Schedule) -> list[str]:
    try:
        schedule.check_order()
    except RecipeError as error:
        return [_with_hint(error)]
    return []


def _matmul_refusals(schedule: Schedule, gm: fx.GraphModule) -> list[str]:
    try:
        schedule.check_matmuls(gm)
    except RecipeError as error:
        return [_with_hint(error)]
    return []


def _format_refusals(schedule: Schedule) -> list[str]:
    try:
        schedule.check_formats()
    except LoweringError as error:
        return [_with_hint(error)]
    return []


def _assign(gm: fx.GraphModule, ctx: PassContext, recipe: Recipe) -> tuple[PassResult, list[str]]:
    """Assign schemes; what the pass said, and what was refused.

    Globs that match nothing are refused one by one, so that the rest can still be planned.
    """
    paths = [path for node in matmuls(gm) for path in paths_of(node)]
    used, refusals = [], []
    for glob, scheme in recipe.schemes.items():
        if glob == "*" or matches(glob, paths):
            used.append((glob, scheme))
            continue
        try:
            AssignSchemes(schemes=((glob, scheme),)).run(gm, ctx)
        except RecipeError as error:
            refusals.append(_with_hint(error))
    try:
        return AssignSchemes(tuple(used), recipe.head).run(gm, ctx), refusals
    except RecipeError as error:  # matmuls that read one tensor disagree: each has its scheme
        return PassResult(), [*refusals, _with_hint(error)]


def _assign_pass(recipe: Recipe) -> AssignSchemes:
    return AssignSchemes(tuple(recipe.schemes.items()), recipe.head)


def _glob_refusals(gm: fx.GraphModule, recipe: Recipe) -> list[str]:
    """What the recipe's passes say of their own globs."""
    refusals = []
    for step in recipe.passes:
        try:
            check_globs(step.name, step.globs, gm, recipe.allow_unmatched)
        except RecipeError as error:
            refusals.append(_with_hint(error))
    return refusals


def describe_matmul(
    node: fx.Node, scheme: Scheme, members: Sequence[int], choice: Choice | None, note: str
) -> MatmulPlan:
    """A row of the plan; `members`: the experts that the scheme is of, none of a dense matmul."""
    n, k = Linear.of(node).shape
    experts = ExpertLinear.match(node)
    weight = scheme.weight
    grouped = weight if weight is not None and weight.granularity == "per_group" else None
    return MatmulPlan(
        name=module_path(node) or label(node),
        n=n,
        k=k,
        scheme=scheme.name,
        group_size=grouped.group_size_for(k) if grouped else None,
        kernel=_kernel(choice, experts is not None) if choice else None,
        few_tokens=choice.few_tokens if choice else 0,
        decode_us=round(choice.decode_us, 1) if choice else None,
        prefill_us=round(choice.prefill_us, 1) if choice else None,
        others=dict(choice.losers) if choice else {},
        gives_logits=gives_logits(node),
        bias=Linear.of(node).bias is not None,
        experts=len(members) or 1,
        note=note,
    )


def _kernel(choice: Choice, experts: bool) -> str:
    return f"expert_{choice.kernel}" if experts else choice.kernel


def _with_hint(error: PanguqError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
