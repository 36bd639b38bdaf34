"""`compile`: trace, passes in order, lowering. Read this file first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from panguq.artifact import FAKE_QUANT, LOWERED, Artifact
from panguq.compile_data import CompileData
from panguq.compile_key import PassedChecks, held_units, open_units
from panguq.compiled_model import compiled_model
from panguq.compiled_module import CompiledModule
from panguq.data.calibration import probe_of
from panguq.dumps.dump import Dump, chosen_folder
from panguq.ir.edit import clone, store_folded
from panguq.ir.encoder import Examples
from panguq.ir.run.sweep import Progress
from panguq.lowering.lower_matmuls import check_lowerable
from panguq.lowering.scheme_costs import TargetRules
from panguq.lowering.stages import default_dtype
from panguq.lowering.targets import find_target
from panguq.models.hf import source_tokenizer
from panguq.models.wrappers import language_model_of
from panguq.passes.pipeline.base import PassContext, check_seed, no_progress
from panguq.passes.pipeline.runner import Instrument, Runner
from panguq.ranks import as_ranks, ranks
from panguq.recipe import Recipe, RecipeLike
from panguq.report.left_in_float import left_in_float
from panguq.report.progress import terminal_progress
from panguq.report.quality import Quality
from panguq.report.smoothing import nowhere_to_smooth, smoothing_sites
from panguq.schedule import Schedule
from panguq.tensors.memory import new_garbage_alone, return_large_blocks
from panguq.tensors.weight_store import WeightStore
from panguq.tensors.work_folder import WorkFolder
from panguq.tracing import in_dtype, trace


@as_ranks()
def compile(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    calibration: Any = None,
    sampled: int = 0,
    tokenizer: Any = None,
    example_inputs: Examples = None,
    target: str = "cpu",
    dtype: torch.dtype | None = None,
    allow_unmatched: bool = False,
    dump_dir: str | Path | None = None,
    work_dir: str | Path | WorkFolder | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CompiledModule:
    """Compile a model under a recipe into a graph of the target's kernels.

    model: a causal language model of transformers, be it inside a vision wrapper, another of its
        models (an encoder, a classifier, a reranker, a vision tower), or any nn.Module together
        with `example_inputs`. It is never changed; tensors that no pass rewrites are shared.
    recipe: a built-in recipe's name (`panguq.recipes()`), a YAML file, a mapping, or a Recipe.
    calibration: the path of a file, texts or conversations (with `tokenizer`), token ids, or
        batches (docs/calibration.md has all forms); for other modules, and models that read more
        than text, an iterable of inputs. Without it, a recipe that needs data samples sequences
        from a causal language model itself, or takes the example inputs, and says so.
        `report.calibration` says what was used.
    tokenizer: the model's; it is saved along. None: the one in the local folder that the model was
        loaded from, if there is one.
    sampled: this many more sequences, as long as the longest of `calibration`, that a causal
        language model writes itself. GPTQ and its relatives fit the text that they see; some of
        the model's own keeps what they choose from being good for `calibration` alone.
    target: `cpu`, `ascend910b1` … `ascend910b4`, the path of a target file, or `reference`: no
        kernels, so that the fake-quantized model is what runs. It takes every scheme.
    dtype: what the model and its example inputs are cast to before anything else. By default a
        model keeps its own on a CPU and becomes bfloat16 for an Ascend target, whose kernels take
        16-bit floats.
    allow_unmatched: let globs of the recipe match no matmul of the model, which otherwise is an
        error; a built-in recipe's own may.
    dump_dir: a folder for the pass-by-pass dump; `PANGUQ_DUMP` gives a default.
    work_dir: a folder for finished parts. Where a compile was killed, the same one goes on from
        them, with the bits of one that was not; another one starts anew. A model saved on the same
        disk shares the large parts. The folder is not needed once the model is saved. One compile
        at a time may use it; a `WorkFolder` that the caller holds stays the caller's.

    Under an initialized `torch.distributed` all its processes compile together, each with the same
    arguments (docs/several-processes.md): the result has the same bits, every process gets it, and
    the first one alone writes files, logs and progress.

    The C library is told to return freed blocks of 4 MiB and more to the system at once, for the
    whole process and from now on; without that a compile needs a gigabyte more.

    Raises PanguqError's subclasses: RecipeError and LoweringError before any calibration,
    TraceError, InputError for unusable data, NumericsError for tensors that are not finite, in the
    end LoweringError where the lowered graph is not the quantized one any more,
    StorageError for a full disk or a `work_dir` that cannot be used, RankError, in all of several
    processes, for one that has ended.
    """
    joint = ranks()
    return_large_blocks()
    check_seed(seed)
    recipe = Recipe.of(recipe, allow_unmatched=allow_unmatched)
    schedule = Schedule.of(recipe, target)
    schedule.check_order()
    schedule.check_formats()
    dump_folder = chosen_folder(dump_dir)
    model = language_model_of(model)
    tokenizer = source_tokenizer(model) if tokenizer is None else tokenizer
    dtype = dtype or default_dtype(target)
    example_inputs = in_dtype(example_inputs, dtype)
    calibrated = schedule.needs_calibration
    data = CompileData.read(model, calibration, sampled, tokenizer, example_inputs, calibrated)
    found = find_target(target)
    rules = TargetRules(found, recipe.precision, recipe.ascend)
    with new_garbage_alone(), held_units(work_dir) as units:
        checks = PassedChecks(units)
        gm, interface = trace(model, example_inputs, dtype, once=checks.once)
        ctx = PassContext(
            interface,
            WeightStore(units=units),
            seed=seed,
            progress=(progress or terminal_progress()) if joint.is_first else no_progress,
            matmul_rules=rules if found.lowers else None,
            allow_unmatched=recipe.allow_unmatched,
        )
        quality = Quality(ctx)
        quality.warn(gm.meta.pop("trace_warnings", ()))
        quality.warn(getattr(model, "panguq_left_out", ()))
        dump_folder = dump_folder if joint.is_first else None
        dump = Dump.open(dump_folder, recipe, seed, target, ctx, quality.summaries, (gm, model))
        watching: list[Instrument] = [quality, *([dump] if dump else [])]
        runner = Runner(ctx, watching if joint.is_first else [], once=checks.once)

        records = runner.run(gm, schedule.described)
        schedule.check_described(gm, ctx.allow_unmatched)
        check_lowerable(gm, found, recipe.precision)
        quality.warn(left_in_float(gm, schedule.assign, [record.result for record in records]))
        sites, _ = smoothing_sites(gm, interface, schedule.calibrated)
        quality.warn(nowhere_to_smooth(sites, interface))
        ctx.reference = clone(gm)

        data.prepare(gm, ctx, target)
        open_units(units, gm, data.batches, data.sampled, recipe, target, seed)
        checks.settle()
        ctx.batches = data.sample(gm, ctx, target)
        ctx.written = data.written
        ctx.probe = probe_of(ctx.batches, interface)
        runner.run(gm, schedule.calibrated)
        store_folded(gm, ctx.store.put)
        fake_quant = clone(gm)

        quality.before_lowering()
        runner.run(gm, schedule.lowering)

        report = joint.from_first(lambda: quality.report(target, gm, fake_quant, data))
        if dump:
            dump.close(report)
        quality.conclude(report)
    made = Artifact({FAKE_QUANT: fake_quant, LOWERED: gm}, ctx.interface, recipe, target, report)
    of_transformers = ctx.interface.kind != "module"
    return compiled_model(made.of(model, tokenizer) if of_transformers else made)
