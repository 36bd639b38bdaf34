"""`compile`: trace, passes in order, lowering. Read this file first."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, fx, nn

from panguq.artifact import FAKE_QUANT, LOWERED, Artifact
from panguq.calibration import (
    SAMPLED_SEQUENCES,
    SAMPLED_TOKENS,
    Batches,
    causal_lm_batches,
    module_batches,
    probe_of,
    sample_sequences,
)
from panguq.calibration_data import GIVEN, CalibrationData, decoded, read_calibration
from panguq.compile_key import compile_key
from panguq.compiled_model import CompiledModule, compiled_model
from panguq.errors import InputError
from panguq.hf import source_tokenizer
from panguq.inputs import takes_empty_mask
from panguq.ir.edit import clone, store_folded
from panguq.ir.interface import Interface
from panguq.ir.memory import return_large_blocks
from panguq.ir.trace import is_causal_lm
from panguq.ir.unit_folder import Finished, UnitFolder
from panguq.ir.weight_store import WeightStore
from panguq.lowering.lower_matmuls import check_lowerable
from panguq.lowering.scheme_costs import TargetRules
from panguq.lowering.stages import default_dtype
from panguq.lowering.target import TargetKind
from panguq.lowering.targets import find_target
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.base import Pass, PassContext, Progress
from panguq.passes.module_globs import check_globs
from panguq.passes.pipeline import Instrument, PassRecord, Runner
from panguq.recipe import Recipe, RecipeLike
from panguq.report.compile_report import CalibrationSummary
from panguq.report.dump import Dump, chosen_folder
from panguq.report.left_in_float import left_in_float
from panguq.report.progress import terminal_progress
from panguq.report.quality import Quality
from panguq.schedule import Schedule
from panguq.tracing import trace

logger = logging.getLogger("panguq")
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _with_units(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let `function`, which takes `work_dir` as a `UnitFolder`, take a path: held until it ends."""

    @functools.wraps(function)
    def holding(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        work_dir: Any = kwargs.get("work_dir")
        if work_dir is None or isinstance(work_dir, UnitFolder):
            return function(*args, **kwargs)
        kwargs["work_dir"] = units = UnitFolder(Path(work_dir))
        try:
            return function(*args, **kwargs)
        finally:
            units.leave()

    return holding


@_with_units
def compile(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    calibration: Any = None,
    sampled: int = 0,
    tokenizer: Any = None,
    example_inputs: Sequence[Tensor] | None = None,
    target: str = "cpu",
    dtype: torch.dtype | None = None,
    allow_unmatched: bool = False,
    dump_dir: str | Path | None = None,
    work_dir: str | Path | UnitFolder | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CompiledModule:
    """Compile a model under a recipe into a graph of the target's kernels.

    model: a transformers causal language model, or any nn.Module together with
        `example_inputs`. It is never changed; tensors that no pass rewrites are shared.
    recipe: a built-in recipe's name (`panguq.recipes()`), a YAML file, a mapping, or a Recipe.
    calibration: the path of a file, texts or conversations (with `tokenizer`), token ids, or
        batches (docs/calibration.md has all forms); for other modules an iterable of inputs.
        Without it, a recipe that needs data samples sequences from the model itself (other modules:
        takes the example inputs), and says so. `report.calibration` says what was used.
    tokenizer: the model's; it is saved along. None: the one in the local folder that the model was
        loaded from, if there is one.
    sampled: this many more sequences, as long as the longest of `calibration`, that a causal
        language model writes itself. GPTQ and its relatives fit the text that they see; some of
        the model's own keeps what they choose from being good for `calibration` alone.
    target: `cpu`, `ascend910b1` … `ascend910b4`, or the path of a target file.
    dtype: what the model is cast to before anything else. By default a model keeps its own on a
        CPU and becomes bfloat16 for an Ascend target, whose kernels take 16-bit floats.
    allow_unmatched: let globs of the recipe match no matmul of the model, which otherwise is an
        error; a built-in recipe's own may.
    dump_dir: a folder for the pass-by-pass dump; `PANGUQ_DUMP` gives a default.
    work_dir: a folder for finished parts. Where a compile was killed, the same one goes on from
        them, with the bits of one that was not; another one starts anew. A model saved on the same
        disk shares the large parts. The folder is not needed once the model is saved. One compile
        at a time may use it; a `UnitFolder` that the caller holds stays the caller's.

    The C library is told to return freed blocks of 4 MiB and more to the system at once, for the
    whole process and from now on; without that a compile needs a gigabyte more.

    Raises PanguqError's subclasses: RecipeError and LoweringError before any calibration,
    TraceError, InputError for unusable data, NumericsError for tensors that are not finite, in the
    end LoweringError where the lowered graph is not the quantized one any more,
    StorageError for a full disk or a `work_dir` that cannot be used.
    """
    return_large_blocks()
    if sampled < 0:
        raise InputError(f"sampled {sampled}: a number of sequences is not negative")
    recipe = Recipe.of(recipe, allow_unmatched=allow_unmatched)
    dump_folder = chosen_folder(dump_dir)
    schedule = Schedule.of(recipe, target)
    schedule.check_order()
    progress = progress or terminal_progress()
    units = work_dir if isinstance(work_dir, UnitFolder) else None
    if tokenizer is None:
        tokenizer = source_tokenizer(model)

    if calibration is not None and is_causal_lm(model):  # what cannot be read is refused at once
        longest = getattr(model.config, "max_position_embeddings", None)
        calibration = read_calibration(calibration, tokenizer, longest=longest)
    gm, interface = trace(model, example_inputs, dtype or default_dtype(target))
    told = gm.meta.pop("trace_warnings", ())
    for warning in told:
        logger.warning(warning)
    rules = TargetRules(find_target(target), recipe.precision, recipe.ascend)
    ctx = PassContext(
        interface,
        WeightStore(units=units),
        seed=seed,
        progress=progress,
        matmul_rules=rules,
        allow_unmatched=recipe.allow_unmatched,
    )
    quality = Quality(ctx)
    dump = Dump.open(dump_folder, recipe, seed, target, ctx, quality.summaries)
    instruments: list[Instrument] = [quality, *([dump] if dump else [])]
    if dump:
        dump.traced(gm, model)

    runner = Runner(ctx, instruments)
    records = runner.run(gm, schedule.described)
    for step in schedule.calibrated:
        check_globs(step.name, step.globs, gm, ctx.allow_unmatched)
    quality.known = (*told, *_left_in_float(gm, schedule.described, records))
    ctx.reference = clone(gm)
    check_lowerable(gm, find_target(target), recipe.precision)
    calibrated = schedule.needs_calibration
    sampled = sampled if calibrated else 0
    kind = find_target(target).kind
    given, used = _given_batches(gm, ctx, calibration, sampled, example_inputs, calibrated, kind)
    if units:
        _open_units(units, compile_key(gm, given, sampled, recipe, target, seed))
    if given is None or sampled:
        own, ids = _sampled_batches(gm, ctx, model, given, sampled, calibrated, kind)
        used = used.with_sampled(len(ids), ids.shape[1], decoded(tokenizer, ids[0]))
        given = [*(given or ()), *own]
    logger.info("calibration data: %s", used)
    ctx.batches = given
    ctx.probe = probe_of(ctx.batches, interface)
    runner.run(gm, schedule.calibrated)
    interface = ctx.interface  # a pass may have given the cache another dtype
    store_folded(gm, ctx.store.put)
    fake_quant = clone(gm)
    quality.before_lowering()
    runner.run(gm, schedule.lowering)

    held_out = calibration.held_out if isinstance(calibration, CalibrationData) else ()
    report = quality.report(target, gm, fake_quant, used, held_out, calibrated)
    unused = tuple(getattr(model, "panguq_unused_weights", ()))
    report = report.model_copy(update={"unused_weights": unused})
    if dump:
        dump.close(report)
    if quality.fault is not None:
        raise quality.fault
    for warning in report.warnings:
        if warning not in quality.known:  # said when it was known
            logger.warning(warning)
    stages = {FAKE_QUANT: fake_quant, LOWERED: gm}
    made = Artifact(stages, interface, recipe, target, report)
    if interface.kind == "causal_lm":
        made = replace(
            made,
            config=_config_of(model, interface),
            generation_config=copy.deepcopy(getattr(model, "generation_config", None)),
            tokenizer=_savable(tokenizer),
        )
    return compiled_model(made)


def _left_in_float(
    gm: fx.GraphModule, described: Sequence[Pass], records: Sequence[PassRecord]
) -> tuple[str, ...]:
    """Warnings of matmuls that stay float against the recipe's wish, said before the long work."""
    assign = next(step for step in described if isinstance(step, AssignSchemes))
    found = left_in_float(gm, assign, [record.result for record in records])
    for warning in found:
        logger.warning(warning)
    return tuple(found)


def _savable(tokenizer: Any) -> Any:
    """The tokenizer if it can be saved along with the model, else None and a warning."""
    if tokenizer is None or hasattr(tokenizer, "save_pretrained"):
        return tokenizer
    logger.warning(
        "the tokenizer, a %s, is not saved with the model: only those of transformers are",
        type(tokenizer).__name__,
    )
    return None


def _config_of(model: nn.Module, interface: Interface) -> Any:
    """The model's configuration, with the vocabulary that its embedding has."""
    config: Any = copy.deepcopy(model.config)
    config.get_text_config(decoder=True).vocab_size = interface.vocab_size
    return config


def _given_batches(
    gm: fx.GraphModule,
    ctx: PassContext,
    data: Any,
    sampled: int,
    example_inputs: Sequence[Tensor] | None,
    calibrated: bool,
    kind: TargetKind,
) -> tuple[Batches | None, CalibrationSummary]:
    """Batches for calibration and the probe, and where they came from.

    None where they are to be sampled from the model.
    """
    interface = ctx.interface
    if interface.kind != "causal_lm":
        if sampled:
            raise InputError("sampled: only a causal language model writes text of its own")
        source = GIVEN if data is not None else "the example inputs"
        if data is None and calibrated:
            logger.warning("calibration data: none given, so the example inputs serve for it")
        inputs = [tuple(example_inputs or ())] if data is None else data
        batches = module_batches(inputs, interface, example_inputs)
        return batches, CalibrationSummary(source=source, sequences=len(batches))
    if not isinstance(data, CalibrationData):
        return None, CalibrationSummary()
    return causal_lm_batches(data, interface, None, _empty_mask(gm, kind)), data.summary


def _sampled_batches(
    gm: fx.GraphModule,
    ctx: PassContext,
    model: nn.Module,
    given: Batches | None,
    sampled: int,
    calibrated: bool,
    kind: TargetKind,
) -> tuple[Batches, Tensor]:
    """Batches of a causal language model's own, and their token ids `[sequences, tokens]`."""
    if given is not None:
        count, length = sampled, max(batch["input_ids"].shape[1] for batch in given)
    else:
        count, length = (sampled or SAMPLED_SEQUENCES, SAMPLED_TOKENS) if calibrated else (1, 32)
    start = getattr(model.config, "bos_token_id", None) or 0

    def compute() -> Finished:
        shape = (count, length)
        ids = sample_sequences(gm, ctx.interface, start, ctx.generator(), *shape, ctx.progress)
        return Finished({"ids": ids})

    ids = ctx.store.once("calibration/sampled", compute).tensors["ids"]
    if calibrated and not sampled:
        logger.warning(
            "calibration data: none given, so sampled from the model itself: %d sequences of %d "
            "tokens (seed %d)",
            *ids.shape,
            ctx.seed,
        )
    return causal_lm_batches(ids, ctx.interface, None, _empty_mask(gm, kind)), ids


def _empty_mask(gm: fx.GraphModule, kind: TargetKind) -> bool:
    """Whether the graph takes no mask; the fused attention of an Ascend graph reads it in full."""
    return takes_empty_mask(gm) and kind == "cpu"


def _open_units(units: UnitFolder, key: dict[str, str]) -> None:
    changed = units.open_for(key)
    if changed:
        logger.warning(
            "%s holds the parts of another compile, so this one starts anew; different: %s",
            units.path,
            ", ".join(changed),
        )
