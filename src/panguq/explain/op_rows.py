"""Tables of calls of CANN's ops, one a line: `hw, op, shape, dtype, attrs`, and `us` if timed."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panguq.errors import LoweringError, PanguqError
from panguq.files.limits import TABLE_BYTES, read_limited
from panguq.lowering.ascend.op_times.call import SIZES, OperandShape, VendorCall
from panguq.suggest import did_you_mean

COLUMNS = ("hw", "op", "shape", "dtype", "attrs")
_OTHER_UNITS = ("ns", "ms", "s", "sec", "seconds", "time", "duration", "cycles")
_FORM = (
    'a line reads: 910b2,rms_norm,"[[4096,1024],[1024]]","[""float16"",""float16""]",'
    '"{""epsilon"":1e-6}",31.9'
)
_LARGEST = 2**40


@dataclass(frozen=True)
class TableRow:
    """A call; `case` is its name in the table, or the line; `us` its time, None if not given."""

    call: VendorCall
    case: str
    us: float | None


@dataclass(frozen=True)
class OpTable:
    """The rows of one part, and how many rows there are of others."""

    rows: tuple[TableRow, ...]
    others: Mapping[str, int]


def read_rows(path: Path, target: str) -> OpTable:
    """The rows of a CSV file whose `hw` is the target's part: `910b2` for `ascend910b2`.

    Lines that begin with # are comments; columns beyond those named above are ignored. Raises
    LoweringError, naming the line and what it says, for a table that cannot be read whole, and for
    one that has no row of the target's part.
    """
    try:
        text = read_limited(path, TABLE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LoweringError(f"{path}: is not text in UTF-8", _FORM) from None
    except OSError as error:
        raise LoweringError(f"{path}: cannot be read: {error.strerror}") from None
    except PanguqError as error:
        raise LoweringError(error.message, error.hint) from None
    # comments become empty lines, so that lines keep their numbers
    lines = ["" if line.startswith("#") else line for line in text.splitlines()]
    above = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    reader = csv.DictReader(io.StringIO("\n".join(lines[above:])), strict=True)
    rows, others = [], Counter[str]()
    try:
        _check_columns(path, reader.fieldnames)
        for cells in reader:
            line = above + reader.line_num
            where = f"{path}: line {line}"
            if None in cells.values() or None in cells:
                raise LoweringError(f"{where}: has not as many cells as the header", _FORM)
            hw = cells["hw"].strip().lower()
            if not hw:
                raise LoweringError(f"{where}: hw: is empty", _FORM)
            if target not in (hw, f"ascend{hw}"):
                others[hw] += 1
                continue
            rows.append(_row(cells, where, str(line)))
    except csv.Error as error:
        where = f"{path}: line {above + reader.line_num + 1}"
        raise LoweringError(f"{where}: is no CSV: {error}", _FORM) from None
    if not rows:
        seen = f"; its rows are of {', '.join(sorted(others))}" if others else ""
        raise LoweringError(
            f"{path}: has no row of {target}{seen}",
            "the column hw names the part without 'ascend', as in 910b2; --target chooses it",
        )
    return OpTable(tuple(rows), dict(others))


def _check_columns(path: Path, names: Any) -> None:
    if not names:
        raise LoweringError(f"{path}: is empty", _FORM)
    names = [name.strip() for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise LoweringError(f"{path}: has the column {twice[0]!r} twice", _FORM)
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise LoweringError(
            f"{path}: has no column {', '.join(map(repr, missing))}",
            f"the columns are {', '.join(COLUMNS)}, and us for times",
        )
    unit = next((n for n in names if n.lower().rpartition("_")[2] in _OTHER_UNITS), None)
    if unit is not None and "us" not in names:
        raise LoweringError(
            f"{path}: has times in a column {unit!r}, and none in 'us'",
            "give microseconds in a column named us, or leave times out",
        )


def _row(cells: Mapping[str, str], where: str, line: str) -> TableRow:
    op = cells["op"].strip()
    if not op:
        raise LoweringError(f"{where}: op: is empty", _FORM)
    found = {name: _list(cells[name], where, name) for name in ("shape", "dtype")}
    shapes = tuple(_shape(item, f"{where}: shape") for item in found["shape"])
    dtypes = tuple(_dtype(item, f"{where}: dtype") for item in found["dtype"])
    if len(shapes) != len(dtypes):
        raise LoweringError(f"{where}: has {len(shapes)} shapes and {len(dtypes)} dtypes", _FORM)
    text = cells["attrs"].strip()
    attrs = _json(text, where, "attrs") if text else {}
    if not isinstance(attrs, dict):
        raise LoweringError(f"{where}: attrs: {text!r:.60} is no JSON object", _FORM)
    case = (cells.get("case") or "").strip() or line
    return TableRow(VendorCall(op, shapes, dtypes, attrs), case, _us(cells.get("us"), where))


def _us(text: str | None, where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise LoweringError(
            f"{where}: us: {text.strip()!r:.40} is no number of microseconds above zero",
            "leave the cell empty where the call was not timed",
        )
    return value


def _json(text: str, where: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise LoweringError(f"{where}: {name}: {text!r:.60} is no JSON", _FORM) from None


def _list(text: str, where: str, name: str) -> list[Any]:
    found = _json(text, where, name)
    if not isinstance(found, list) or not found:
        raise LoweringError(f"{where}: {name}: {text!r:.60} is no list", _FORM)
    return found


def _shape(item: Any, where: str) -> OperandShape | None:
    if item is None:
        return None
    if not isinstance(item, list) or not item:
        raise LoweringError(f"{where}: {json.dumps(item):.60} is no list of sizes", _FORM)
    for size in item:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < _LARGEST:
            raise LoweringError(
                f"{where}: {json.dumps(item):.60} has the size {json.dumps(size):.20}",
                "sizes are whole numbers from 1 up",
            )
    return tuple(item)


def _dtype(item: Any, where: str) -> str | None:
    if item is None:
        return None
    if not isinstance(item, str) or item not in SIZES:
        raise LoweringError(
            f"{where}: {json.dumps(item):.40} is no known dtype",
            did_you_mean(str(item), SIZES, "dtypes"),
        )
    return item
