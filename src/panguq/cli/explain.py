"""`panguq explain`: which kernel a matmul or a whole model gets, what it costs, and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from panguq.cli import explain_model
from panguq.cli.command import Commands, add_command, add_json, counted, print_json, tokens
from panguq.errors import LoweringError

_TEXT = """\
Say which kernel a matmul gets, what each candidate costs, and why the others lose. Nothing is run:
costs are predicted from the target's constants (docs/cost-model.md says how far they hold).

Give a shape MxNxK, for example 128x256x2048: m tokens, n outputs, k inputs. The answer is the
winner with every term of its cost in microseconds, the runner-up and why it lost, and the table
over m that a compiled graph has, since m varies at run time.

Or give --ops FILE.csv, a table of calls of CANN's ops (hw, op, shape, dtype, attrs, and us where a
call was timed): every call's time by term, and the errors of timed ones by op. --ops OUT, a model
that was compiled for an Ascend target, prices every op of its graph, for a prompt and for a
decoding step behind it.

Or give a model folder (only config.json is read): predicted time of a prompt and of a decoding
step on the device alone, weight bytes and the critical path, against the float model.

With --server, too: what a request takes there, the server's own launch path included, memory, how
many sequences fit the card, and whether quantizing pays, in a sentence. Only servers and modes that
somebody measured are known: vllm-ascend==0.9.2 in graph and in eager mode."""

_EXAMPLES = """\
example:
  panguq explain 128x256x2048 --scheme w8a8 --target ascend910b3
  panguq explain 1x4096x12800 --scheme w4a16-g32 --json
  panguq explain 16x1536x6144 --scheme w8a8 --heat-map gain.png --csv candidates.csv
  panguq explain openpangu-7b --scheme w8a8 --prompt 2048
  panguq explain openpangu-7b --scheme w8a8 --target ascend910b2 --server vllm-ascend --batch 8
  panguq explain 1x4096x4096 --scheme w4a16 --allow-float --target my-910b.yaml
  panguq explain --ops times.csv --target ascend910b2
  panguq explain --ops OUT --target ascend910b2 --batch 8 --prompt 512"""


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(commands, "explain", run, _TEXT, "")
    command.epilog = _EXAMPLES
    command.add_argument(
        "subject", nargs="?", metavar="MODEL_DIR|MxNxK", help="a local model folder, or a shape"
    )
    command.add_argument(
        "--ops",
        metavar="FILE.csv|OUT",
        type=Path,
        help="a table of op calls to price, or a compiled model, in their place",
    )
    command.add_argument(
        "--scheme",
        default="w8a8",
        help="how the matmul is quantized: w8a8, w4a16, w4a16-g32, float … (default: w8a8)",
    )
    command.add_argument(
        "--target",
        default="ascend910b1",
        help="cpu, ascend910b1 to b4, ascend950pr, or a target file in YAML (default: ascend910b1)",
    )
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="the model's (default: bfloat16; on cpu float32)",
    )
    command.add_argument(
        "--weight-format",
        choices=("ND", "NZ"),
        help="the stored integer weight: row by row, or in the cube's order (default: ND; with "
        "--server NZ, which servers store)",
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
    explain_model.add_options(command)
    add_json(command)


def run(options: argparse.Namespace) -> int:
    """Explain and print."""
    from panguq.explain.matmul import looks_like_shape
    from panguq.lowering.targets import find_target

    scheme, target = explain_model.find_scheme(options.scheme), find_target(options.target)
    if (options.ops is None) == (options.subject is None):
        given = "both a subject and --ops" if options.ops else "neither a subject nor --ops"
        raise LoweringError(f"explain was given {given}", "give MODEL_DIR, MxNxK or --ops FILE.csv")
    if options.ops is not None:
        return _run_ops(options, target)
    dtype = options.dtype or str(target.float_dtype or "torch.float32").removeprefix("torch.")
    if not Path(options.subject).exists() and looks_like_shape(options.subject):
        explain_model.refuse_for_shapes(options)
        return _run_shape(options, scheme, target, dtype)
    if target.peaks is None:
        raise LoweringError(
            "a whole model is explained for Ascend targets only",
            "panguq compile MODEL_DIR --recipe RECIPE --dry-run predicts a CPU's matmuls",
        )
    return explain_model.run(options, scheme, target, dtype)


def _run_ops(options: argparse.Namespace, target: Any) -> int:
    from panguq.explain.ops import price_table, render

    if options.ops.is_dir():
        return _run_graph(options, target)
    found = price_table(options.ops, target)
    if options.json:
        print_json(found.as_json())
    else:
        print(render(found))
    return 0


def _run_graph(options: argparse.Namespace, target: Any) -> int:
    from panguq.compiled_model import load
    from panguq.explain.graph_ops import compiled_times, render

    found = compiled_times(load(options.ops), target, options.batch, options.prompt)
    if options.json:
        print_json({phase: times.as_json() for phase, times in found.items()})
    else:
        print(render(found, target.name))
    return 0


def _run_shape(options: argparse.Namespace, scheme: Any, target: Any, dtype: Any) -> int:
    from panguq.explain.files import candidates_csv, neighbours, save_heat_map
    from panguq.explain.matmul import explain, parse_shape, render
    from panguq.lowering.choice import HYSTERESIS

    problem = parse_shape(options.subject, scheme, dtype, options.weight_format or "ND")
    hysteresis = 0.0 if options.exact else HYSTERESIS
    found = explain(problem, target, allow_float=options.allow_float, hysteresis=hysteresis)
    if options.csv is not None:
        text = candidates_csv(problem, found.rows)
        explain_model.write_text(options.csv, text)
    if options.heat_map is not None:
        save_heat_map(options.heat_map, problem, neighbours(problem, target.largest_n), target)
    if options.json:
        print_json(found.as_json())
    else:
        print(render(found))
    return 0
