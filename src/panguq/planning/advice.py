"""Which recipe to take: what each costs and gains on a device and a server, and one advice.

Nothing is calibrated for it and no weight is read: schemes, bytes, times and compile times follow
from the config, and losses are those of other, small models (`accuracy.csv`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import fx
from transformers import PreTrainedModel

from panguq.data.calibration import WINDOW, WINDOWS
from panguq.errors import InputError, LoweringError, PanguqError
from panguq.forecast.forecast import Forecast, Request, forecast, memory_mib
from panguq.forecast.graph import canonical_graph
from panguq.forecast.launch_paths import LaunchPath, find_launch_path
from panguq.forecast.text import NO_DIFFERENCE
from panguq.ir.expert_groups import schemes_of
from panguq.ir.interface import Interface
from panguq.lowering.problem import Dtype
from panguq.lowering.stages import default_dtype
from panguq.lowering.target import Target
from panguq.lowering.targets import find_target
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.mixed_precision import MixedPrecision
from panguq.passes.pipeline.base import PassContext, matmuls
from panguq.passes.quantize_kv_cache import QuantizeKvCache
from panguq.planning.costs import compile_seconds
from panguq.planning.dry_run import describe_matmul
from panguq.planning.format_check import check_format_passes
from panguq.planning.losses import Loss, losses
from panguq.planning.report import MatmulPlan
from panguq.recipe import Recipe, preset_names
from panguq.schedule import Schedule
from panguq.server_models import class_answer
from panguq.server_releases import find_server
from panguq.server_verdicts import verdicts
from panguq.tensors.dtypes import dtype_name
from panguq.tensors.weight_store import WeightStore

NONE = "none"
MOST_LOSS = 10.0
"""A recipe that raises a yardstick's perplexity by more percent is taken for want of room alone."""


@dataclass(frozen=True)
class RecipeRow:
    """A recipe for this model. None where something is not known; `refused`: why the server or the
    target does not take it, empty if it does. Bytes are MiB on one card, times of one request."""

    recipe: str
    schemes: tuple[str, ...]
    takes: bool
    refused: str
    weights_mib: float | None = None
    kv_cache_mib: float | None = None
    total_mib: float | None = None
    fits: bool | None = None
    largest_batch: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    request_s: float | None = None
    gain_over_float: float | None = None
    losses: tuple[Loss, ...] = ()
    compile_s: float | None = None

    @property
    def loss(self) -> float | None:
        """On the first yardstick."""
        if self.recipe == "float":
            return 0.0
        return self.losses[0].perplexity_percent if self.losses else None


@dataclass(frozen=True)
class Advice:
    """All recipes, the one to take (a name, or "none"), why, and what a reader must know."""

    target: str
    server: str
    times_of: str
    request: Request
    recipes: tuple[RecipeRow, ...]
    recipe: str
    reason: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "target": self.target,
            "server": self.server,
            "times_of": self.times_of,
            **asdict(self.request),
            "recipes": [asdict(row) for row in self.recipes],
            "recommendation": {"recipe": self.recipe, "reason": self.reason},
            "notes": list(self.notes),
        }


def advise(
    folder: str | Path,
    target: str = "ascend910b1",
    server: str = "vllm-ascend",
    mode: str = "graph",
    request: Request | None = None,
    card_bytes: int | None = None,
) -> Advice:
    """Weigh all built-in recipes for the model in a folder, of which only the config is read.

    server: `NAME` or `NAME==VERSION`; which recipes it takes is known by name, its launch path only
    where somebody measured it, and else that of the newest measured one is taken and said to be.
    Raises InputError for an unknown server and a model that does not generate, LoweringError for a
    target without predictions.
    """
    from panguq.models.hf import skeleton
    from panguq.models.wrappers import language_model_of

    machine = find_target(target)
    if machine.peaks is None:
        raise LoweringError(
            f"target {machine.name}: advice is for Ascend targets only", "--target ascend910b2"
        )
    known = find_server(server)
    path, notes = _path(server, mode)
    model = language_model_of(skeleton(folder))
    recipes = [Recipe.named(name) for name in preset_names()]
    globs = dict.fromkeys(
        glob
        for recipe in recipes
        for glob in (*recipe.schemes, *(glob for step in recipe.passes for glob in step.globs))
    )
    dtype = default_dtype(target)
    gm, interface = canonical_graph(model, None, dtype, list(globs))
    if interface.kind != "causal_lm":
        raise InputError(f"{folder}: advice is of models that generate, and this one does not")
    gm.meta["config"] = model.config if isinstance(model, PreTrainedModel) else None
    answer = class_answer(known, model.config.to_dict() | {"architectures": [type(model).__name__]})
    if answer.has is not True:
        notes.append(answer.reason)
    asked = request or Request()
    weigh = _Weigher(gm, interface, machine, path, asked, known, card_bytes, losses())
    rows = tuple(weigh.row(recipe) for recipe in recipes)
    notes += list(dict.fromkeys(weigh.notes))
    name, reason = _choose(rows, no_class=answer.reason if answer.has is False else "")
    notes.append(
        "losses are those of SmolLM2-135M, a far smaller model: larger ones lose less, by a factor "
        "that nobody knows before it is measured (panguq eval)"
    )
    return Advice(
        machine.name, server, f"{path.name}, {path.mode} mode", asked, rows, name, reason,
        tuple(notes),
    )  # fmt: skip


def _path(server: str, mode: str) -> tuple[LaunchPath, list[str]]:
    try:
        return find_launch_path(server, mode), []
    except InputError as error:
        if mode not in ("graph", "eager"):
            raise
        path = find_launch_path("vllm-ascend", mode)
        return path, [f"{error.message}: times are those of {path.name} in {path.mode} mode"]


class _Weigher:
    """Makes a row of each recipe out of one graph, whose schemes it changes."""

    def __init__(
        self,
        gm: fx.GraphModule,
        interface: Interface,
        target: Target,
        path: LaunchPath,
        request: Request,
        server: str,
        card_bytes: int | None,
        known: dict[str, tuple[Loss, ...]],
    ) -> None:
        self._gm, self._interface, self._target, self._path = gm, interface, target, path
        self._request, self._server, self._card_bytes = request, server, card_bytes
        self._losses = known
        self.notes: list[str] = []

    def row(self, recipe: Recipe) -> RecipeRow:
        """The recipe's row."""
        ctx = PassContext(self._interface, WeightStore(), allow_unmatched=True)
        AssignSchemes(tuple(recipe.schemes.items()), recipe.head).run(self._gm, ctx)
        planned = self._planned()
        names = tuple(dict.fromkeys(row.scheme for row in planned if row.scheme != "FLOAT"))
        refused = self._refusal(recipe, planned)
        row = RecipeRow(
            recipe.name,
            names or ("FLOAT",),
            takes=not refused,
            refused=refused,
            losses=self._losses.get(recipe.name, ()),
            compile_s=round(self._compile_s(recipe), 1),
        )
        try:
            found = self._forecast(recipe)
        except PanguqError as error:
            return replace(row, takes=False, refused=refused or error.message)
        self.notes += [note for note in found.notes if " refused: " not in note]
        memory = memory_mib(found)
        return replace(
            row,
            weights_mib=memory["weights"],
            kv_cache_mib=memory["kv_cache"],
            total_mib=memory["total"],
            fits=found.fits,
            largest_batch=found.memory.largest_batch(self._request.context),
            ttft_ms=found.times.prefill.ms,
            tpot_ms=found.times.decode.ms,
            request_s=found.times.request_s,
            gain_over_float=found.gain,
        )

    def _planned(self) -> list[MatmulPlan]:
        return [
            describe_matmul(node, scheme, members, None, "")
            for node in matmuls(self._gm)
            for scheme, members in schemes_of(node).items()
        ]

    def _refusal(self, recipe: Recipe, planned: Sequence[MatmulPlan]) -> str:
        if recipe.name == "float":
            return ""
        try:
            check_format_passes(recipe)
        except PanguqError as error:
            return error.message
        choosers = [step for step in recipe.passes if isinstance(step, MixedPrecision)]
        if choosers:
            planned = [
                row.model_copy(update={"scheme": scheme.name})
                for row in planned
                if row.scheme != "FLOAT"
                for scheme in choosers[-1].schemes
            ]
        answer = verdicts(planned, self._server)
        if answer.takes:
            return ""
        if answer.no_class:
            return answer.no_class
        first = answer.refusals[0]
        return f"{first.scheme}: {first.reason}"

    def _compile_s(self, recipe: Recipe) -> float:
        schedule = Schedule.of(recipe, self._target.name)
        return compile_seconds(self._gm, schedule.passes, WINDOWS * WINDOW)

    def _forecast(self, recipe: Recipe) -> Forecast:
        interface = self._interface
        if any(isinstance(step, QuantizeKvCache) for step in recipe.passes):
            halved = tuple(
                layer.model_copy(update={"key_dtype": "int8", "value_dtype": "int8"})
                for layer in interface.cache
            )
            interface = interface.model_copy(update={"cache": halved})
        return forecast(
            self._gm,
            interface,
            self._target,
            self._path,
            self._request,
            scheme=recipe.name,
            dtype=cast(Dtype, dtype_name(self._target.float_dtype)) if self._target.float_dtype
            else cast(Dtype, interface.float_dtype),
            card_bytes=self._card_bytes,
        )  # fmt: skip


def _choose(rows: Sequence[RecipeRow], no_class: str) -> tuple[str, str]:
    """The recipe to take, and why."""
    if no_class:
        return NONE, no_class
    plain = next(row for row in rows if row.recipe == "float")
    taken = [row for row in rows if row.takes and row is not plain and row.loss is not None]
    fitting = [row for row in taken if row.fits is not False]
    if plain.fits is False:
        if not fitting:
            return (
                NONE,
                "neither the float model nor any recipe that the server takes fits the card",
            )
        best = min(fitting, key=lambda row: (row.loss or 0.0, row.compile_s or 0.0))
        return best.recipe, (
            f"the float model does not fit ({_gib(plain.total_mib)}); of the recipes that the "
            f"server takes and that fit, {best.recipe} ({_gib(best.total_mib)}) loses least"
        )
    bearable = [row for row in fitting if (row.loss or 0.0) <= MOST_LOSS]
    gains = [row for row in bearable if (row.gain_over_float or 0.0) > 1 + NO_DIFFERENCE]
    if not gains:
        quick = [row for row in bearable if (row.gain_over_float or 0.0) >= 1 - NO_DIFFERENCE]
        smallest = min(
            quick or bearable,
            key=lambda row: (row.weights_mib or 0.0, row.loss or 0.0),
            default=None,
        )
        saved = ""
        if smallest is not None and smallest.weights_mib and plain.weights_mib:
            slower = 1 / (smallest.gain_over_float or 1.0) - 1
            saved = (
                f"; for memory alone, {smallest.recipe} saves "
                f"{_gib(plain.weights_mib - smallest.weights_mib)}"
            )
            saved += f" and takes {slower:.0%} longer" if slower > NO_DIFFERENCE else ""
        return NONE, (
            "the float model fits, and no recipe that the server takes makes this request faster "
            f"by more than {NO_DIFFERENCE:.0%}{saved}"
        )
    fastest = max(row.gain_over_float or 0.0 for row in gains)
    near = [row for row in gains if (row.gain_over_float or 0.0) >= fastest * 0.98]
    best = min(near, key=lambda row: (row.loss or 0.0, row.compile_s or 0.0))
    return best.recipe, (
        f"it makes this request {best.gain_over_float:.2f} times as fast as float, and of the "
        f"recipes within 2% of the fastest that the server takes it loses least "
        f"({best.loss:+.2f}% perplexity on another model)"
    )


def _gib(mib: float | None) -> str:
    return "?" if mib is None else f"{mib / 1024:.1f} GiB"
