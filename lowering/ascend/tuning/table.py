"""Tables of op times: `op_summary` of msprof, `kernel_details` of torch_npu's profiler, and others
of that form.

A row is one call, or the mean of several: the op's type, the shapes, dtypes and formats of its
inputs and outputs, each list divided by semicolons, and microseconds.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from panguq.errors import LoweringError

LARGEST_BYTES = 256 << 20
_HINT = "export it with msprof --export, or torch_npu's profiler with record_shapes=True"
# By what headers are without case, spaces, underscores and a unit.
_COLUMNS = {
    "op": ("optype", "type", "kerneltype"),
    "shapes": ("inputshapes", "inputshape"),
    "dtypes": ("inputdatatypes", "inputdatatype", "inputdtypes"),
    "formats": ("inputformats", "inputformat"),
    "duration": ("taskduration", "duration", "averageduration", "avgduration", "avgtime", "avg"),
}
_OPTIONAL = {
    "out_shapes": ("outputshapes", "outputshape"),
    "out_dtypes": ("outputdatatypes", "outputdatatype", "outputdtypes"),
}
_SAID = {
    "op": "OP Type",
    "shapes": "Input Shapes",
    "dtypes": "Input Data Types",
    "formats": "Input Formats",
    "duration": "Task Duration(us)",
}
TensorShape = tuple[int, ...]


@dataclass(frozen=True)
class OpRow:
    """A timed op. `line` is where it stands in the file; a scalar's or an absent input's shape is
    empty. dtypes are written as in `bfloat16`, formats as the table has them."""

    line: int
    op: str
    shapes: tuple[TensorShape, ...]
    dtypes: tuple[str, ...]
    formats: tuple[str, ...]
    out_shapes: tuple[TensorShape, ...]
    out_dtypes: tuple[str, ...]
    us: float


def read_op_table(path: Path) -> list[OpRow]:
    """The rows that ran on the NPU's cores and have shapes.

    Raises LoweringError, naming the line, for a file that is no such table, columns that are
    missing, a unit that is not us, a shape of zero and a duration that cannot be.
    """
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise LoweringError(f"{path}: is larger than {LARGEST_BYTES >> 20} MiB", "cut it down")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LoweringError(f"{path}: cannot be read: {error.strerror}", _HINT) from None
    except UnicodeDecodeError:
        raise LoweringError(f"{path}: is no text in UTF-8", _HINT) from None
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    if not lines:
        raise LoweringError(f"{path}: is empty", _HINT)
    try:
        rows = list(csv.reader((line for _, line in lines), strict=True))
    except csv.Error as error:
        raise LoweringError(f"{path}: is no CSV: {error}", _HINT) from None
    if len(rows) != len(lines):
        raise LoweringError(f"{path}: a quoted field goes over several lines", _HINT)
    found = _find_columns(rows[0], path)
    result = []
    for (number, _), cells in zip(lines[1:], rows[1:], strict=True):
        if len(cells) != len(rows[0]):
            raise LoweringError(
                f"{path}: line {number}: has {len(cells)} fields, the header {len(rows[0])}"
            )
        named = {name: cells[column] for name, column in found.items()}
        row = _row(named, number, f"{path}: line {number}")
        if row is not None:
            result.append(row)
    if not result:
        raise LoweringError(f"{path}: no row has an op with shapes", _HINT)
    return result


def _find_columns(header: list[str], path: Path) -> dict[str, int]:
    plain = [re.sub(r"\(.*\)|[\s_]", "", cell).lower() for cell in header]
    found: dict[str, int] = {}
    for name, spellings in (_COLUMNS | _OPTIONAL).items():
        places = [plain.index(spelling) for spelling in spellings if spelling in plain]
        if places:
            found[name] = places[0]
    missing = [_SAID[name] for name in _COLUMNS if name not in found]
    if missing:
        raise LoweringError(f"{path}: has no column {', '.join(missing)}", _HINT)
    title = header[found["duration"]]
    unit = re.search(r"\(\s*([^)]*?)\s*\)|_(us|ms|ns|s)$", title.strip())
    said = (unit[1] or unit[2] or "").lower() if unit else ""
    if said not in ("us", "μs", "µs"):
        raise LoweringError(
            f"{path}: column {title!r}: is in {said or 'no unit that it names'}, not in us",
            "write microseconds into a column Task Duration(us)",
        )
    return found


def _row(cells: dict[str, str], line: int, where: str) -> OpRow | None:
    op, text = cells["op"].strip(), cells["duration"].strip()
    shapes = _shapes(cells["shapes"], where)
    if not op or op == "N/A" or not any(shapes):  # what ran elsewhere: a collective, a copy
        return None
    try:
        us = float(text)
    except ValueError:
        raise LoweringError(f"{where}: duration {text[:40]!r} is not a number") from None
    if not math.isfinite(us) or us <= 0:
        raise LoweringError(f"{where}: a duration of {text} us cannot be")
    return OpRow(
        line,
        op,
        shapes,
        tuple(_dtype(name) for name in _parts(cells["dtypes"])),
        tuple(_parts(cells["formats"])),
        _shapes(cells.get("out_shapes", ""), where),
        tuple(_dtype(name) for name in _parts(cells.get("out_dtypes", ""))),
        us,
    )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.replace('"', "").split(";")]


def _shapes(text: str, where: str) -> tuple[TensorShape, ...]:
    if text.strip().strip('"') in ("", "N/A"):
        return ()
    result = []
    for part in _parts(text):
        if not re.fullmatch(r"([0-9]{1,12}(,\s*[0-9]{1,12})*,?)?", part):
            raise LoweringError(f"{where}: shape {part[:60]!r} is no list of sizes")
        sizes = tuple(int(size) for size in part.split(",") if size.strip())
        if 0 in sizes:
            raise LoweringError(
                f"{where}: the shape {part} has a size of zero", "leave out what computes nothing"
            )
        result.append(sizes)
    return tuple(result)


def _dtype(name: str) -> str:
    """`DT_BF16` and `BFLOAT16` are `bfloat16`; `FLOAT` is `float32`."""
    plain = name.upper().removeprefix("DT_")
    known = {"BF16": "bfloat16", "FLOAT": "float32", "FP16": "float16", "FP32": "float32"}
    return known.get(plain, plain.lower())
