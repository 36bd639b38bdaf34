"""`panguq tune`: measure this machine's kernels and write a target file for it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from panguq.cli import tune_from
from panguq.cli.command import Commands, add_command, add_json, print_json, whole
from panguq.errors import InputError, LoweringError

_TEXT = """\
Measure the matmul kernels of the cpu target on this machine and write their costs as a target file.
The costs decide which kernel a matmul gets, and from how many tokens on another one takes over;
they never change what a kernel computes. The file is YAML, for --target FILE and target="FILE".

Takes about a minute (--quick: some seconds, less exact). Other work on the machine disturbs it;
with one thread, --clock cpu counts this program's own time alone.

With --from, fit an Ascend target to op times of your own NPU instead: op_summary of msprof, or
kernel_details of torch_npu's profiler. What was measured is used as it is, between two numbers of
tokens interpolated, and explain says so; everything else follows the fitted constants."""


_EXAMPLES = """\
example:
  panguq tune --out my-cpu.yaml
  panguq tune --from op_summary.csv --target ascend910b2 --out mine.yaml"""


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(commands, "tune", run, _TEXT, "panguq tune --out my-cpu.yaml")
    command.epilog = _EXAMPLES
    command.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("cpu-tuned.yaml"),
        help="the target file to write (default: cpu-tuned.yaml)",
    )
    command.add_argument(
        "--from",
        dest="table",
        metavar="FILE.csv",
        type=Path,
        help="fit to this table of op times; nothing is measured here",
    )
    command.add_argument(
        "--target",
        help="with --from, the target whose constants to start from (default: ascend910b1)",
    )
    command.add_argument(
        "--threads",
        metavar="N",
        type=whole(1, 4096),
        help="threads to use (default: PyTorch's own number)",
    )
    command.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
    command.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        help="what to count (default: wall); cpu needs --threads 1",
    )
    add_json(command)


def run(options: argparse.Namespace) -> int:
    """Measure, fit, write, print."""
    from panguq.lowering.cpu.tuning.tune import FULL, QUICK, check_threads, tune
    from panguq.lowering.target_files import save_target

    check_target_file(options.out)
    if options.table is not None:
        return tune_from.run(options)
    if options.target is not None:
        raise InputError("--target is for --from, where a target is started from", "leave it out")
    options.clock = options.clock or "wall"
    threads = check_threads(options.threads, options.clock)
    grid = QUICK if options.quick else FULL
    found = tune(grid, threads, options.clock, _show_progress)
    save_target(found.target, options.out)
    if options.json:
        print_json(_as_json(found, options.out))
    else:
        print(_render(found, options.out))
    return 0


def check_target_file(path: Path) -> None:
    """Raises LoweringError, before any work, if no target file can be written there."""
    if path.suffix not in (".yaml", ".yml"):
        raise LoweringError(f"{path}: a target file is YAML", f"name it {path.stem or 'mine'}.yaml")
    if path.is_dir():
        raise LoweringError(f"{path}: is a folder", "name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LoweringError(
            f"{path}: cannot be written: {error.strerror or error}", "choose another place"
        ) from error


def _show_progress(what: str, seconds: float) -> None:
    end = "\r" if sys.stderr.isatty() else "\n"
    print(
        f"timing shape {what}, about {seconds:.0f} s left   ", end=end, file=sys.stderr, flush=True
    )


def _render(found: Any, path: Path) -> str:
    lines = [
        f"{'kernel':32} {'launch':>9} {'weights':>11} {'products':>13}   errors: mean, worst",
    ]
    for kernel, fit in found.fits.items():
        cost = fit.cost
        lines.append(
            f"{kernel:32} {cost.launch_us:6.4g} us {cost.gb_per_s:6.4g} GB/s "
            f"{cost.gmac_per_s:6.4g} GMAC/s   {fit.mean_error:.1%}, {fit.worst_error:+.0%}"
        )
    ratio = found.bfloat16_ratio
    lines.append(
        f"float matmuls of many tokens: bfloat16 takes {ratio:.2f} times as long as float32, so "
        f"precision: auto means {'bfloat16' if ratio < 1 else 'float32'}"
    )
    return "\n".join([*lines, f"written to {path}; use it as --target {path}"])


def _as_json(found: Any, path: Path) -> dict[str, Any]:
    return {
        "out": os.fspath(path),
        "target": found.target.name,
        "bfloat16_ratio": found.bfloat16_ratio,
        "kernels": {
            kernel: {
                **dataclasses.asdict(fit.cost),
                "mean_error": fit.mean_error,
                "worst_error": fit.worst_error,
            }
            for kernel, fit in found.fits.items()
        },
        "timings": [
            {"kernel": t.kernel, "m": t.m, "n": t.n, "k": t.k, "us": t.microseconds}
            for t in found.timings
        ],
    }
