"""What a format will refuse of a compile, said before it begins: from a dry run, without data.

Only what the recipe decides is known here. What the data decide (a bias that is too large for an
int32 sum, outlier channels that are split off) is said when the model is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from panguq.errors import ExportError
from panguq.formats.checkpoint.architecture import check_modules
from panguq.formats.checkpoint.graph import parts_of_experts
from panguq.formats.registry import LinearsCheck, find_format
from panguq.ir.quant_spec import Scheme, parse_scheme
from panguq.lowering.stages import default_dtype
from panguq.models.hub_names import HubNames, hub_names
from panguq.passes.flatquant import FlatQuant
from panguq.passes.mixed_precision import MixedPrecision
from panguq.passes.quantize_kv_cache import QuantizeKvCache
from panguq.passes.rotate import Rotate
from panguq.passes.transforms.factors import split_axis
from panguq.passes.transforms.sites import takes_a_transform
from panguq.planning.dry_run import plan
from panguq.planning.report import MatmulPlan, Plan
from panguq.recipe import Recipe
from panguq.server_models import missing_classes
from panguq.server_releases import SERVERS
from panguq.server_verdicts import mixed_layers
from panguq.servers import READS
from panguq.serving_form import splits_outliers


@dataclass(frozen=True)
class PlannedLinear:
    """A linear that is to be quantized, in the terms of `LinearForm`."""

    path: str
    scheme: Scheme
    shape: tuple[int, int]
    has_bias: bool
    is_expert: bool = False
    split: tuple[int, int] | None = None

    @classmethod
    def of(cls, row: MatmulPlan, recipe: Recipe) -> PlannedLinear:
        """The linear of a planned matmul under the recipe."""
        scheme, experts = parse_scheme(row.scheme), row.experts > 1
        turned = any(isinstance(step, FlatQuant) for step in recipe.passes) and not experts
        split = split_axis(row.k) if turned and takes_a_transform(scheme) else None
        return cls(row.name, scheme, (row.n, row.k), row.bias, experts, split)

    @property
    def group_size(self) -> int:
        assert self.scheme.weight is not None
        return self.scheme.weight.group_size_for(self.shape[1])

    @property
    def has_zero_point(self) -> bool:
        return self.scheme.weight is not None and not self.scheme.weight.symmetric


def check_format(
    format: str,
    model: nn.Module,
    recipe: Recipe,
    *,
    target: str = "cpu",
    dtype: torch.dtype | None = None,
    planned: Plan | None = None,
) -> tuple[Plan | None, list[str]]:
    """Raises ExportError, in the words of saving, for a compile that the format could not hold.

    model: a transformers causal language model, with or without weights. planned: its dry run, if
    there was one. Returns the dry run that told, None where the format takes everything, and a
    sentence for each server that will not take the checkpoint though others do, or that may not.
    InputError for an unknown format; otherwise raises what `plan` does.
    """
    check = find_format(format).linears_check()
    if check is None:
        return None, []
    found = planned or plan(model, recipe, target=target, dtype=dtype)
    check_format_passes(recipe)
    linears: dict[str, PlannedLinear] = {}
    for row in found.matmuls:
        if row.scheme != "FLOAT":  # experts of one matmul may have several
            name = f"{row.name} ({row.scheme})" if row.name in linears else row.name
            linears[name] = PlannedLinear.of(row, recipe)
    check_modules(model, (linear for linear in linears.values() if not linear.is_expert))
    names = hub_names(model)
    for linear in linears.values():
        if linear.is_expert:
            parts_of_experts(linear.path, names)
    mixed = _mixed_experts(names, recipe, found)
    of_experts = find_format(format).experts_check()
    computes_in = dtype or default_dtype(target) or next(model.parameters()).dtype
    warnings = _first_that_passes(_possible(linears, recipe, found), check, computes_in)
    warnings += of_experts(mixed) if of_experts is not None else []
    if found.model_type is not None:
        config = {"model_type": found.model_type, "architectures": found.architectures}
        readers = [server for server in SERVERS if format in READS[server]]
        warnings += missing_classes(readers, config)
    if splits_outliers(recipe):
        warnings.append(
            f"{format} cannot hold outlier channels that are split off, and the recipe splits them "
            "where the data have any; w8a8-serving and w8a8-dynamic-serving do not"
        )
    return found, warnings


def check_format_passes(recipe: Recipe) -> None:
    """Raises ExportError for passes whose work no checkpoint format holds."""
    for step in recipe.passes:
        if isinstance(step, QuantizeKvCache):
            raise ExportError(
                "no checkpoint format says that a KV cache is quantized",
                "compile without quantize-kv-cache, and let the server quantize its cache",
            )
        if isinstance(step, Rotate) and step.online:
            raise ExportError(
                "no checkpoint format has a place for rotations that the graph computes",
                "compile without rotate's online",
            )


def _mixed_experts(names: HubNames, recipe: Recipe, found: Plan) -> dict[str, list[str]]:
    """The layers, as published, whose experts get several schemes; none where a later pass
    chooses among schemes."""
    if any(isinstance(step, MixedPrecision) for step in recipe.passes):
        return {}
    merged = names.merged
    said = {}
    for layer, kinds in mixed_layers(found.matmuls).items():
        inside = next((parts for name, parts in merged.items() if name.startswith(layer + ".")), ())
        said[inside[0].name.rsplit(".", 3)[0] if inside else layer] = kinds
    return said


def _possible(
    linears: Mapping[str, PlannedLinear], recipe: Recipe, found: Plan
) -> list[Mapping[str, PlannedLinear]]:
    """The schemes that may come out: those of the plan, or one of a later pass's choices."""
    choosers = [step for step in recipe.passes if isinstance(step, MixedPrecision)]
    if not choosers:
        return [linears]
    fixed = {row.name for row in found.matmuls if row.gives_logits}
    return [
        {
            name: linear if name in fixed else replace(linear, scheme=scheme)
            for name, linear in linears.items()
        }
        for scheme in choosers[-1].schemes
    ]


def _first_that_passes(
    possible: list[Mapping[str, PlannedLinear]], check: LinearsCheck, dtype: torch.dtype
) -> list[str]:
    """The warnings of what the format takes. Raises ExportError, the last, if it takes none."""
    error: ExportError | None = None
    for linears in possible:
        try:
            return list(check(linears, dtype))
        except ExportError as refused:
            error = refused
    assert error is not None
    raise error
