"""`panguq compile`: a model folder and a recipe into a folder of the compiled model."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from panguq.cli.command import (
    Commands,
    add_command,
    add_json,
    counted,
    print_json,
    quiet_transformers,
    tokens,
    whole,
)
from panguq.cli.compile_end import (
    check_data,
    check_end,
    check_server,
    is_for_servers,
    saving_verdict,
)
from panguq.cli.compile_places import check_out, held_places, saved
from panguq.cli.several import is_first
from panguq.errors import InputError, RecipeError
from panguq.formats.registry import FORMATS

_DTYPES = ("float32", "bfloat16", "float16")


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "compile",
        run,
        "Quantize a model and compile it. Without --calibration, a recipe that needs data samples "
        "it from the model. `torchrun --nproc-per-node N -m panguq compile …` divides the work "
        "among N processes, with the same result.",
        "panguq compile smollm2 --recipe w8a8 --calibration text.txt --out smollm2-w8a8",
        together=True,
    )
    command.add_argument(
        "model", metavar="MODEL_DIR", type=Path, help="a local model folder or .gguf file"
    )
    command.add_argument(
        "--recipe", required=True, help="a built-in recipe's name (panguq recipes) or a YAML file"
    )
    command.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="text, or a .jsonl, .json or .parquet file of texts or conversations",
    )
    command.add_argument("--windows", type=counted, default=16, help="pieces of text to take")
    command.add_argument("--window", type=tokens, default=512, help="tokens in each of them")
    command.add_argument(
        "--sampled",
        metavar="N",
        type=whole(1, 2**14),
        default=0,
        help="calibrate on this many pieces more, which the model writes itself",
    )
    command.add_argument("--out", metavar="DIR", type=Path, help="where to save the result")
    command.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="panguq",
        help="of --out: panguq's own, or a checkpoint for servers (default: panguq)",
    )
    command.add_argument("--force", action="store_true", help="replace the model in --out")
    command.add_argument(
        "--work-dir",
        metavar="DIR",
        type=Path,
        help="where finished parts are kept until the model is saved; the same command, run again "
        "after it was stopped, goes on from them (default: .NAME.work beside --out NAME)",
    )
    command.add_argument("--dump", metavar="DIR", type=Path, help="write what each pass did")
    command.add_argument("--target", default="cpu", help="what to compile for (default: cpu)")
    command.add_argument("--dtype", choices=_DTYPES, help="cast the model first")
    command.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, help="for sampling (default: 0)"
    )
    command.add_argument(
        "--scheme",
        metavar="GLOB=SCHEME",
        action="append",
        default=[],
        help="override the recipe for some modules, as in '*.down_proj=W8A16'; may be repeated",
    )
    command.add_argument(
        "--allow-unmatched",
        action="store_true",
        help="let globs of the recipe and of --scheme match nothing, which is an error otherwise",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="only say what would happen, without the weights"
    )
    command.add_argument(
        "--build",
        action="store_true",
        help="also compile the result's code, into your own cache (PANGUQ_CACHE, else "
        "~/.cache/panguq), where it is found when the model is loaded; needs a C++ compiler",
    )
    command.add_argument(
        "--for",
        dest="server",
        metavar="NAME[==VERSION]",
        help="refuse before the work what this server (vllm-ascend, vllm-ascend==0.23, mindie, "
        "sglang, vllm, transformers) has no kernel for; with --dry-run: say which matmuls these "
        "are, and what to choose. For a server, as with the --format of one, a recipe that splits "
        "outlier channels off is taken in its serving form",
    )
    add_json(command)


def run(options: argparse.Namespace) -> int:
    """Plan, or compile and save; of several processes the first alone writes and reports."""
    recipe = _recipe(options)
    if options.server is not None and not options.dry_run:
        check_server(options.server, options.out, options.format)
    if options.dry_run and options.build:
        raise InputError("--build does not go with --dry-run", "a dry run makes nothing to build")
    if not is_first():
        if options.dry_run:
            return 0
        options.out = options.work_dir = None
    if options.out is not None:
        check_out(options.out, options.force, options.format)
    import torch

    dtype = getattr(torch, options.dtype) if options.dtype else None
    quiet_transformers()
    if options.dry_run:
        return _dry_run(options, recipe, dtype)

    from panguq.compiler import compile
    from panguq.data.calibration_data import read_calibration
    from panguq.lowering.targets import find_target
    from panguq.models.hf import existing_folder, load_pretrained, load_tokenizer
    from panguq.models.wrappers import language_model_of

    find_target(options.target)
    existing_folder(options.model)
    tokenizer = (_tokenizer_if_any if options.calibration is None else load_tokenizer)(
        options.model
    )
    with held_places(options.out, options.work_dir) as places:
        model = language_model_of(load_pretrained(options.model))
        check_data(options, recipe, model)
        check_end(options, recipe, dtype, model)
        calibration = None
        if options.calibration is not None:
            sizes = (options.window, options.windows)
            calibration = read_calibration(options.calibration, tokenizer, *sizes)
        compiled = compile(
            model,
            recipe,
            calibration=calibration,
            sampled=options.sampled,
            tokenizer=tokenizer,
            target=options.target,
            dtype=dtype,
            dump_dir=options.dump,
            work_dir=places.units,
            seed=options.seed,
        )
        if options.out is not None:
            compiled.save(options.out, overwrite=options.force, format=options.format)
            places.saved = True
    if not is_first():
        return 0
    with saved(options.out):
        if options.build:
            report = compiled.build()
            if report.is_built and not options.json:
                print(f"built in {report.folder}: {report.seconds:.0f} s")
                print(f"{report.differing} of {report.compared} values differ from the graph's")
        if options.json:
            print_json({**compiled.report.model_dump(), "out": _text(options.out)})
        else:
            print(_summary(compiled, options))
        sys.stdout.flush()
    return 0


def _recipe(options: argparse.Namespace) -> Any:
    from panguq.recipe import Recipe

    recipe = Recipe.of(options.recipe, allow_unmatched=options.allow_unmatched)
    if is_for_servers(options.server, options.format):
        recipe = _serving_form(recipe)
    overrides = {}
    for entry in options.scheme:
        glob, equals, scheme = entry.rpartition("=")
        if not equals or not glob:
            raise RecipeError(f"--scheme {entry!r}", "write GLOB=SCHEME, as in '*.down_proj=W8A16'")
        overrides[glob] = scheme
    return recipe.with_schemes(overrides) if overrides else recipe


def _serving_form(recipe: Any) -> Any:
    from panguq.serving_form import serving_form

    served = serving_form(recipe)
    if served is not recipe:
        logging.getLogger("panguq").warning(
            "recipe %s splits outlier channels off, which no checkpoint format can hold: its "
            "serving form %s is taken",
            recipe.name,
            served.name,
        )
    return served


def _dry_run(options: argparse.Namespace, recipe: Any, dtype: Any) -> int:
    from panguq.planning.dry_run import plan

    found = plan(
        options.model,
        recipe,
        target=options.target,
        dtype=dtype,
        windows=options.windows,
        window=options.window,
        calibrated=options.calibration is not None,
    )
    verdict = _server_verdict(options, recipe, found)
    saving = saving_verdict(options, recipe, dtype, found)
    if options.json:
        server = {} if verdict is None else {"server": {**asdict(verdict), "takes": verdict.takes}}
        print_json({**found.model_dump(), **server, **({"saving": saving} if saving else {})})
    else:
        print(found.render())
        for line in saving.get("refusals", []):
            print(f"\n--format {options.format} refuses the model: {line}")
        for line in saving.get("warnings", []):
            print(f"warning: {line}")
        if verdict is not None:
            print(f"\n{verdict.render()}")
    refused = verdict is not None and not verdict.takes
    return 1 if found.refusals or refused or saving.get("refusals") else 0


def _server_verdict(options: argparse.Namespace, recipe: Any, found: Any) -> Any:
    """What the server of --for would say; None if none was asked for."""
    from panguq.server_verdicts import verdicts
    from panguq.serving_form import splits_outliers

    if options.server is None:
        return None
    return verdicts(found, options.server, splits_outliers=splits_outliers(recipe))


def _tokenizer_if_any(folder: Path) -> Any:
    from panguq.models.hf import load_tokenizer

    try:
        return load_tokenizer(folder)
    except InputError as error:  # it would only have been saved along
        logging.getLogger("panguq").warning("no tokenizer is saved: %s", error.message)
        return None


def _summary(compiled: Any, options: argparse.Namespace) -> str:
    from panguq.evaluation import weight_figures

    report, figures = compiled.report, weight_figures(compiled)
    lines = [f"{options.model} with recipe {compiled.recipe.name} for target {report.target}"]
    lines.append(f"calibration data: {report.calibration}")
    lines += [
        f"  {p.name:24} {p.changed:5} changed {p.skipped:5} skipped {p.seconds:8.1f} s"
        + ("" if p.worst_local_sqnr_db is None else f"   worst {p.worst_local_sqnr_db:.1f} dB")
        for p in report.passes
    ]
    lines.append(
        f"decoder linears: {figures['bits_per_weight']:.2f} bits a weight; activations "
        f"{figures['static_share']:.1%} static, {figures['dynamic_share']:.1%} dynamic, "
        f"{figures['float_share']:.1%} float"
    )
    if report.end_to_end is not None:
        lines.append(f"end to end: {report.end_to_end}")
    lines += [f"warning: {warning}" for warning in report.warnings]
    if options.out is not None:
        size = sum(file.stat().st_size for file in options.out.iterdir())
        lines.append(f"saved as {options.out} ({size / 2**20:.1f} MiB)")
    dump = options.dump or os.environ.get("PANGUQ_DUMP")
    if dump:
        lines.append(f"dump in {dump}")
    return "\n".join(lines)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
