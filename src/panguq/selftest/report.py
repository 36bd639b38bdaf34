"""The self-test's report: JSON for a program, text for a person, times for `panguq tune --from`."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panguq.errors import StorageError
from panguq.selftest.device import COLUMNS
from panguq.selftest.run import CallRow

FILES = ("report.json", "report.txt", "op_summary.csv")
STAND_IN = (
    "The device does not add 1 to a number: it is a stand-in. This run shows that the self-test "
    "runs, and nothing about an NPU; results were not judged."
)


def write_files(
    folder: Path, found: dict[str, Any], rows: Sequence[CallRow], kernels: Sequence[dict[str, str]]
) -> str:
    """Write the three files and return the text. Raises StorageError where it cannot."""
    text = render(found, rows)
    content = {**found, "rows": [row.as_json() for row in rows]}
    parts = (json.dumps(content, indent=1) + "\n", text + "\n", op_summary(kernels))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in zip(FILES, parts, strict=True):
            (folder / name).write_text(part, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written: {error.strerror or error}", "choose another --out"
        ) from error
    return text


def op_summary(kernels: Sequence[dict[str, str]]) -> str:
    """Kernels and their microseconds in the columns of msprof's op_summary, the header alone if
    none was timed by the device's own clock."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(COLUMNS.values()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(kernels)
    return stream.getvalue()


def render(found: dict[str, Any], rows: Sequence[CallRow]) -> str:
    """What was found, the worst first."""
    lines = ["panguq selftest", ""]
    lines += [f"{name:14} {value}" for name, value in found["versions"].items()]
    lines += [f"{'device':14} {found['device']}, costs of target {found['target']}", ""]
    if found["stand_in"]:
        lines += [STAND_IN, ""]
    for part, what in (
        ("op", "torch_npu's ops"),
        ("kernel", "panguq's own kernels"),
        ("model", "models"),
    ):
        of_part = [row for row in rows if row.part == part]
        counts = Counter(row.verdict for row in of_part)
        said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        lines.append(f"{what}: {said or 'not run'}")
        for row in sorted(
            of_part, key=lambda row: row.verdict != "differs" and row.verdict != "failed"
        ):
            lines.append(f"  {row.verdict:10} {row.name} {row.case}: {row.said}{_times(row)}")
    lines += ["", *_schedules(rows)]
    return "\n".join(lines).rstrip()


def _times(row: CallRow) -> str:
    if row.us is None:
        return ""
    predicted = "" if row.predicted_us is None else f", predicted {row.predicted_us:.1f}"
    return f" ({row.us:.1f} us by {row.timed_by}{predicted})"


def _schedules(rows: Sequence[CallRow]) -> list[str]:
    """Of each shape, which schedule was faster, and which one was predicted to be."""
    shapes: dict[tuple[str, str], list[CallRow]] = {}
    for row in rows:
        if row.part == "kernel" and row.us is not None and row.predicted_us is not None:
            shapes.setdefault((row.name, row.case.split(":")[0]), []).append(row)
    lines, right = [], 0
    for (scheme, shape), of_shape in shapes.items():
        if len(of_shape) < 2:
            continue
        fastest = min(of_shape, key=lambda row: row.us or 0.0)
        chosen = min(of_shape, key=lambda row: row.predicted_us or 0.0)
        right += fastest is chosen
        lost = (chosen.us or 0.0) / (fastest.us or 1.0)
        lines.append(
            f"  {scheme} {shape}: fastest {_kernel(fastest)}, chosen {_kernel(chosen)}, "
            f"{lost:.2f}x its time"
        )
    return (
        [f"schedules: the predicted one was the fastest for {right} of {len(lines)} shapes", *lines]
        if lines
        else []
    )


def _kernel(row: CallRow) -> str:
    return row.case.split(": ")[1]
