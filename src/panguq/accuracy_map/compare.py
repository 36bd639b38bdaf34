"""Two maps side by side: which cells differ, and whether that is within noise."""

from __future__ import annotations

import math
from typing import Any

from panguq.accuracy_map.folder import Cell, MapFolder
from panguq.errors import InputError
from panguq.tasks.outcome import ScoredItem, of_json
from panguq.tasks.task_list import TASKS, Task
from panguq.tasks.verdict import SIGNIFICANT, compared


def compare_maps(first: MapFolder, second: MapFolder) -> list[dict[str, Any]]:
    """A row for each cell of the same recipe, task and mode: both values and statuses, the
    difference with its interval, and `noise`, whether it is within that.

    Where both answered the same items the interval is paired; otherwise it is that of two samples,
    1.96 standard errors. Raises InputError where the maps share no cell.
    """
    others = {_key(cell): cell for cell in second.cells()}
    rows = [
        _row(first, second, cell, others[_key(cell)])
        for cell in first.cells()
        if _key(cell) in others
    ]
    if not rows:
        raise InputError(
            f"{first.path} and {second.path} have no cell in common",
            "compare maps of the same recipes and tasks",
        )
    return rows


def _key(cell: Cell) -> tuple[Any, ...]:
    return cell["recipe"], cell["task"], cell.get("thinking")


def _row(first: MapFolder, second: MapFolder, one: Cell, other: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {
        "recipe": one["recipe"],
        "task": one["task"],
        "thinking": one.get("thinking"),
    }
    row |= {"before": one.get("value"), "after": other.get("value")}
    row |= {"status_before": one["status"], "status_after": other["status"]}
    if row["before"] is None or row["after"] is None:
        return row | {"difference": None, "low": None, "high": None, "noise": None, "paired": False}
    x, y = (of_json(f.items(c["name"])) for f, c in ((first, one), (second, other)))
    if one["protocol"] == other["protocol"] and _same(x, y):
        found = compared(TASKS.get(one["task"]) or Task(one["task"], one["kind"], ""), x, y)
        noise = found["p"] >= SIGNIFICANT
        return row | {k: found[k] for k in ("difference", "low", "high")} | {
            "noise": noise, "paired": True
        }  # fmt: skip
    difference = row["after"] - row["before"]
    spread = 1.96 * math.hypot(one["stderr"], other["stderr"])
    low, high = difference - spread, difference + spread
    return row | {
        "difference": difference, "low": low, "high": high, "noise": low <= 0 <= high,
        "paired": False,
    }  # fmt: skip


def _same(x: list[ScoredItem], y: list[ScoredItem]) -> bool:
    return bool(x) and [item.prompt for item in x] == [item.prompt for item in y]


def compare_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [f"{'recipe':20} {'task':16} {'before':>9} {'after':>9} {'difference':>11}  verdict"]
    for row in rows:
        shown = [_number(row[name]) for name in ("before", "after", "difference")]
        status = row["status_after"]
        changed = "" if row["status_before"] == status else f"{row['status_before']} → {status}, "
        noise = {None: "no figure", True: "within noise", False: "more than noise"}[row["noise"]]
        mode = f"/{row['thinking']}" if row["thinking"] else ""
        lines.append(
            f"{row['recipe']:20} {row['task'] + mode:16} {shown[0]:>9} {shown[1]:>9} "
            f"{shown[2]:>11}  {changed}{noise}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
