"""The texts of a dump that people read: summary, tables, and what is said of a failure."""

from __future__ import annotations

import csv
import io
import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path

from panguq.compile_report import CompileReport, PassSummary
from panguq.dumps.files import DumpInfo
from panguq.errors import PanguqError
from panguq.passes.pipeline.base import Pass, Table


def summary_text(
    info: DumpInfo, lines: Sequence[PassSummary], failure: str, report: CompileReport | None
) -> str:
    """`summary.txt`: one line a pass, then a failure, then what the report says at the end."""
    on = info.environment
    plural = "" if on.threads == 1 else "s"
    said = [
        f"recipe {info.recipe['name']}, target {info.target}, seed {info.seed}",
        f"panguq {on.panguq}, torch {on.torch}, transformers {on.transformers}, "
        f"python {on.python}, {on.threads} thread{plural}",
    ]
    if info.model is not None:
        said.append(f"weights that no pass changed are read from {info.model.path}")
    width = max((len(line.name) for line in lines), default=0)
    said += ["", f"{'pass':<{width}}  changed  skipped        ms  result"]
    said += [
        f"{line.name:<{width}}  {line.changed:7}  {line.skipped:7}  {line.seconds * 1e3:8.0f}  "
        f"{quality_text(line)}".rstrip()
        for line in lines
    ]
    if failure:
        said += ["", failure]
    if report is not None:
        said += ["", f"calibration data: {report.calibration}"]
    if report is not None and report.warnings:
        said += ["", "warnings", *(f"- {warning}" for warning in report.warnings)]
    return "\n".join(said) + "\n"


def quality_text(line: PassSummary) -> str:
    """How well a pass kept the model's function, as far as it was measured."""
    if line.proved_difference is not None:
        return f"exact: differs by {line.proved_difference:.1e} in float64"
    if line.worst_local_sqnr_db is not None:
        return f"worst local SQNR {line.worst_local_sqnr_db:.1f} dB: {line.worst_matmul}"
    return ""


def csv_text(table: Table) -> str:
    """A table as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return buffer.getvalue()


def error_text(dump: Path, stage: str, step: Pass, error: BaseException) -> str:
    """`error.txt` of a failed pass."""
    message = error.message if isinstance(error, PanguqError) else str(error)
    hint = f"Hint: {error.hint}\n" if isinstance(error, PanguqError) and error.hint else ""
    trace = "".join(traceback.format_exception(error))
    return (
        f"The pass {step.name} failed on the graph in graph.txt.\n\n"
        f"{type(error).__name__}: {message}\n{hint}\n"
        "To see it again, from this dump alone:\n\n"
        f"    panguq run {shlex.quote(str(dump))} --limit {stage}\n\n{trace}"
    )
