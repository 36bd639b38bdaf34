"""`panguq selftest`: what an NPU makes of panguq's kernels, as a report that can be sent."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panguq.cli.command import Commands, add_command, add_json, print_json, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from panguq.selftest.run import CallRow

_TEXT = """\
Check and time panguq's kernels on an Ascend NPU and write a report. It needs no model and takes
about twenty minutes (--quick: some five).

It calls every op of torch_npu that a compiled model may contain, in every layout and dtype, and
compares codes and outputs with panguq's CPU body; runs panguq's own kernels against their
references, without and with Split-K, beside the times that the cost model predicts; and takes
a tiny model of random weights through compile, to("npu") and generate.

  DIR/report.txt       what was found, failures first
  DIR/report.json      the same for a program
  DIR/op_summary.csv   each kernel's time, as `panguq tune --from` reads it

Attach them to an issue: they hold versions, ops, shapes and times, and no names of hosts or users
and no paths. Exit status 1 if a call failed or differs."""


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands, "selftest", run, _TEXT, "panguq selftest --device npu:0 --out report/"
    )
    command.add_argument("--device", default="npu:0", help="npu:0 (the default), npu:1, ...")
    command.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("report"), help="default: report"
    )
    command.add_argument(
        "--target", help="whose costs to compare times with (default: the one of the device's name)"
    )
    command.add_argument("--quick", action="store_true", help="one shape of the Split-K grid")
    add_json(command)


def run(options: argparse.Namespace) -> int:
    """Test, write, print."""
    from panguq.selftest.start import start

    quiet_transformers()
    session, found = start(options.device, options.target)
    from panguq.selftest.report import write_files
    from panguq.selftest.run import own_kernels, tiny_model, vendor_ops

    rows: list[CallRow] = []
    for part in (vendor_ops(session), own_kernels(session, options.quick), tiny_model(session)):
        rows += _shown(part)
    text = write_files(options.out, found, rows, session.kernels)
    if options.json:
        print_json({**found, "rows": [row.as_json() for row in rows]})
    else:
        print(text)
    return 1 if any(row.verdict in ("failed", "differs") for row in rows) else 0


def _shown(rows: Iterator[CallRow]) -> Iterator[Any]:
    for row in rows:
        print(f"{row.part} {row.name} {row.case}: {row.verdict}", file=sys.stderr, flush=True)
        yield row
