"""A table of op calls priced: each row's prediction by term, and the errors of timed ones by op."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panguq.errors import LoweringError
from panguq.explain.op_rows import TableRow, read_rows
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.price import machine_of, price, source_of
from panguq.lowering.target import Cost, Target


@dataclass(frozen=True)
class PricedRow:
    """A row with its cost, or the reason why it has none."""

    row: TableRow
    cost: Cost | None
    source: str

    @property
    def error(self) -> float | None:
        """The relative error; None if the row is not timed or has no price."""
        if self.cost is None or self.row.us is None:
            return None
        return self.cost.total_us / self.row.us - 1

    def as_json(self) -> dict[str, Any]:
        """Plain data. `predicted_us` is None where there is no price; `source` then says why."""
        return {
            "op": self.row.call.op,
            "case": self.row.case,
            "us": self.row.us,
            "predicted_us": None if self.cost is None else self.cost.total_us,
            "terms": {} if self.cost is None else self.cost.terms,
            "source": self.source,
        }


@dataclass(frozen=True)
class OpTimes:
    """All rows of a table that are the target's part; `others` counts those of other parts."""

    target: str
    rows: tuple[PricedRow, ...]
    others: Mapping[str, int]

    def by_op(self) -> dict[str, dict[str, Any]]:
        """Rows, errors of those that are timed, and rows without a price, by op."""
        found: dict[str, dict[str, Any]] = {}
        for op in sorted({row.row.call.op for row in self.rows}):
            rows = [row for row in self.rows if row.row.call.op == op]
            errors = np.abs([row.error for row in rows if row.error is not None])
            found[op] = {
                "rows": len(rows),
                "median_error": float(np.median(errors)) if len(errors) else None,
                "p90_error": float(np.quantile(errors, 0.9)) if len(errors) else None,
                "worst_error": float(errors.max()) if len(errors) else None,
                "unpriced": sum(row.cost is None for row in rows),
            }
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "target": self.target,
            "rows": [row.as_json() for row in self.rows],
            "ops": self.by_op(),
            "rows_of_other_parts": dict(self.others),
        }


def price_table(path: Path, target: Target) -> OpTimes:
    """Price the rows of a table (`op_rows.read_rows`) that are the target's.

    Raises LoweringError for a target that is no NPU, and as `read_rows` does. An op without a model
    is no error: its rows say why they have no price.
    """
    machine = machine_of(target)
    table = read_rows(path, target.name)
    rows = tuple(_priced(row, machine) for row in table.rows)
    return OpTimes(target.name, rows, table.others)


def _priced(row: TableRow, target: AscendMachine) -> PricedRow:
    try:
        found = price(row.call, target)
    except LoweringError as error:
        return PricedRow(row, None, error.message)
    return PricedRow(row, found, source_of(row.call.op, target))


def render(found: OpTimes) -> str:
    """The table for a reader: every row, then every op."""
    head = ("op", "case", "measured us", "predicted us", "error", "terms in us")
    rows = [head, *(_cells(row) for row in found.rows)]
    lines = [f"{len(found.rows)} calls on {found.target} (predicted)", "", *_columns(rows)]
    summary: list[tuple[str, ...]] = [
        ("op", "rows", "median error", "P90", "worst", "without a price")
    ]
    for op, entry in found.by_op().items():
        errors = (entry[name] for name in ("median_error", "p90_error", "worst_error"))
        cells = ("" if error is None else f"{error:.1%}" for error in errors)
        summary.append((op, str(entry["rows"]), *cells, str(entry["unpriced"] or "")))
    lines += ["", *_columns(summary)]
    reasons = {row.source: None for row in found.rows if row.cost is None}
    if reasons:
        lines += ["", "without a price:", *(f"  {reason}" for reason in reasons)]
    if found.others:
        counts = ", ".join(f"{count} of {hw}" for hw, count in sorted(found.others.items()))
        lines += ["", f"left out, being of other parts: {counts}"]
    return "\n".join(lines)


def _cells(row: PricedRow) -> tuple[str, ...]:
    us = "" if row.row.us is None else f"{row.row.us:.1f}"
    if row.cost is None:
        return row.row.call.op, row.row.case, us, "none", "", ""
    terms = ", ".join(f"{name} {value:.1f}" for name, value in row.cost.terms.items() if value)
    error = "" if row.error is None else f"{row.error:+.0%}"
    return row.row.call.op, row.row.case, us, f"{row.cost.total_us:.1f}", error, terms


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
