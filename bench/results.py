"""Rows of a benchmark, kept in a JSON file as each is finished, and tables written into pages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


class Results:
    """Finished rows by name. With a file, an interrupted run continues where it stopped.

    conditions: what all rows have in common. A file that was written under other ones is refused
    with SystemExit, since its rows would not compare.
    """

    def __init__(self, path: Path | None, conditions: Mapping[str, Any]) -> None:
        self.path = path
        self.conditions = dict(conditions)
        self.rows: dict[str, Row] = {}
        if path is None or not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("conditions") != self.conditions:
            raise SystemExit(
                f"{path} holds results under other conditions: {found.get('conditions')}, "
                f"not {self.conditions}; name another file, or remove it"
            )
        self.rows = found["rows"]

    def finished(self, name: str) -> bool:
        """Whether the row is there and no failure; failures are tried again."""
        return name in self.rows and "error" not in self.rows[name]

    def put(self, name: str, row: Row) -> None:
        """Keep a row; the file is replaced in one step, so that it is always whole."""
        self.rows[name] = row
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        text = json.dumps({"conditions": self.conditions, "rows": self.rows}, indent=2)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)


def markdown_table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A Markdown table; every row has as many cells as there are columns."""
    lines = [columns, ["---"] * len(columns), *rows]
    if any(len(line) != len(columns) for line in lines):
        raise ValueError(f"a row has not the {len(columns)} cells of {list(columns)}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_between_markers(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a page.

    Raises ValueError if the page lacks the markers.
    """
    old = page.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, found, rest = old.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no {start.strip()} … {end}")
    page.write_text(f"{head}{start}{text.strip()}\n{end}{tail}", encoding="utf-8")
