"""`panguq explain`: which kernel a matmul or a whole model gets, what it costs, and why."""

from __future__ import annotations

import argparse
import dataclasses
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
)
from panguq.errors import LoweringError

_TEXT = """\
Say which kernel a matmul gets, what each candidate costs, and why the others lose. Nothing is run:
costs are predicted from the target's constants (docs/cost-model.md says how far they hold).

Give a shape MxNxK, for example 128x256x2048: m tokens, n outputs, k inputs. The answer is the
winner with every term of its cost in microseconds, the runner-up and why it lost, and the table
over m that a compiled graph has, since m varies at run time.

Or give a model folder (only config.json is read): predicted time of a prompt and of a decoding
step, weight bytes and the critical path, against the float model."""

_EXAMPLES = """\
example:
  panguq explain 128x256x2048 --scheme w8a8 --target ascend910b3
  panguq explain 1x4096x12800 --scheme w4a16-g32 --json
  panguq explain 16x1536x6144 --scheme w8a8 --heat-map gain.png --csv candidates.csv
  panguq explain openpangu-7b --scheme w8a8 --prompt 2048
  panguq explain 1x4096x4096 --scheme w4a16 --allow-float --target my-910b.yaml"""


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(commands, "explain", run, _TEXT, "")
    command.epilog = _EXAMPLES
    command.add_argument(
        "subject", metavar="MODEL_DIR|MxNxK", help="a local model folder, or a shape"
    )
    command.add_argument(
        "--scheme",
        default="w8a8",
        help="how the matmul is quantized: w8a8, w4a16, w4a16-g32, float … (default: w8a8)",
    )
    command.add_argument(
        "--target",
        default="ascend910b1",
        help="cpu, ascend910b1 to b4, or a target file in YAML (default: ascend910b1)",
    )
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="the model's (default: bfloat16; on cpu float32)",
    )
    command.add_argument(
        "--weight-format",
        choices=("ND", "NZ"),
        default="ND",
        help="the stored integer weight: row by row, or in the cube's order (default: ND)",
    )
    command.add_argument(
        "--allow-float",
        action="store_true",
        help="let a float matmul win where it is the cheapest, against the scheme",
    )
    command.add_argument(
        "--exact",
        action="store_true",
        help="a table over m with the cheapest kernel for every m; by default a kernel stays until "
        "it costs 5%% more than the cheapest",
    )
    command.add_argument(
        "--prompt", type=tokens, default=1024, help="tokens in a prompt, for a model"
    )
    command.add_argument("--batch", type=counted, default=1, help="sequences, for a model")
    command.add_argument(
        "--csv", metavar="FILE", type=Path, help="write all candidates with all terms"
    )
    command.add_argument(
        "--heat-map",
        metavar="FILE.png",
        type=Path,
        help="draw the gain of Split-K over m and (n, k); needs matplotlib",
    )
    add_json(command)


def run(options: argparse.Namespace) -> int:
    """Explain and print."""
    from panguq.explain.matmul import looks_like_shape
    from panguq.ir.quant_spec import parse_scheme
    from panguq.lowering.targets import find_target

    scheme, target = parse_scheme(options.scheme), find_target(options.target)
    dtype = options.dtype or str(target.float_dtype or "torch.float32").removeprefix("torch.")
    if not Path(options.subject).exists() and looks_like_shape(options.subject):
        return _run_shape(options, scheme, target, dtype)
    if target.peaks is None:
        raise LoweringError(
            "a whole model is explained for Ascend targets only",
            "panguq compile MODEL_DIR --recipe RECIPE --dry-run predicts a CPU's matmuls",
        )
    return _run_model(options, scheme, target, dtype)


def _run_shape(options: argparse.Namespace, scheme: Any, target: Any, dtype: Any) -> int:
    from panguq.explain.files import candidates_csv, neighbours, save_heat_map
    from panguq.explain.matmul import explain, parse_shape, render
    from panguq.lowering.choice import HYSTERESIS

    problem = parse_shape(options.subject, scheme, dtype, options.weight_format)
    hysteresis = 0.0 if options.exact else HYSTERESIS
    found = explain(problem, target, allow_float=options.allow_float, hysteresis=hysteresis)
    if options.csv is not None:
        text = candidates_csv(problem, found.rows)
        _write(options.csv, text)
    if options.heat_map is not None:
        save_heat_map(options.heat_map, problem, neighbours(problem, target.largest_n), target)
    if options.json:
        print_json(found.as_json())
    else:
        print(render(found))
    return 0


def _write(path: Path, text: str) -> None:
    from panguq.files.whole_file import output_file, write_file

    with output_file(path, LoweringError) as file:
        write_file(file, [text.encode()])


def graph_of(folder: str | Path, scheme: Any, dtype: str) -> Any:
    """The canonical graph of a model folder with a scheme on every matmul, and its interface."""
    import torch

    from panguq.models.hf import skeleton
    from panguq.passes.assign_schemes import AssignSchemes
    from panguq.passes.canonicalize import Canonicalize
    from panguq.passes.pipeline.base import PassContext
    from panguq.passes.pipeline.runner import Runner
    from panguq.tensors.weight_store import WeightStore
    from panguq.tracing import trace

    gm, interface = trace(skeleton(folder), None, getattr(torch, dtype))
    ctx = PassContext(interface=interface, store=WeightStore())
    described = [Canonicalize(), AssignSchemes(schemes=(("*", scheme.name),))]
    Runner(ctx, prove=False).run(gm, described)  # a proof would need the weights
    return gm, interface


def _run_model(options: argparse.Namespace, scheme: Any, target: Any, dtype: str) -> int:
    quiet_transformers()
    from panguq.explain.files import candidates_csv, save_heat_map
    from panguq.explain.model import explain_model
    from panguq.explain.model_text import PUBLISHED, render

    gm, interface = graph_of(options.subject, scheme, dtype)
    found = explain_model(
        gm,
        interface,
        target,
        dtype,  # type: ignore[arg-type]
        scheme.name,
        prompt=options.prompt,
        batch=options.batch,
        allow_float=options.allow_float,
        weight_format=options.weight_format,
    )
    shapes = [(row.n, row.k) for row in found.matmuls if row.scheme != "FLOAT"]
    if options.heat_map is not None:
        save_heat_map(options.heat_map, _problem(shapes, scheme, dtype), shapes, target)
    if options.csv is not None:
        parts = [_candidates(n, k, scheme, dtype, target, options) for n, k in shapes]
        texts = [candidates_csv(part.problem, part.rows) for part in parts]
        lines = [text if i == 0 else text.split("\n", 1)[1] for i, text in enumerate(texts)]
        _write(options.csv, "".join(lines))
    if options.json:
        phases = {name: {"gain": getattr(found, name).gain} for name in ("prefill", "decode")}
        data = dataclasses.asdict(found)
        for name, extra in phases.items():
            data[name] |= extra
        print_json(data | {"published": PUBLISHED})
    else:
        print(render(found))
    return 0


def _problem(shapes: list[tuple[int, int]], scheme: Any, dtype: Any) -> Any:
    from panguq.lowering.problem import MatmulProblem

    if not shapes:
        raise LoweringError("no matmul of the model is quantized", "choose another scheme")
    return MatmulProblem(1, *shapes[0], scheme, dtype=dtype)


def _candidates(n: int, k: int, scheme: Any, dtype: Any, target: Any, options: Any) -> Any:
    from panguq.explain.matmul import explain
    from panguq.lowering.problem import MatmulProblem

    problem = MatmulProblem(options.batch, n, k, scheme, dtype=dtype)
    return explain(problem, target, allow_float=options.allow_float)
