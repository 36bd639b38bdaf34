"""A table that grows by a row as soon as there is one, and what is being done meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from panguq.report.progress import duration

COLUMNS = (
    ("", 13),
    ("perplexity", 18),
    ("KL", 7),
    ("top-1", 7),
    ("bits/weight", 11),
    ("on disk", 8),
    ("prefill", 7),
    ("decode", 7),
)


class Steps:
    """Says on stderr what is done, with the time since the start; called, it is a Progress.

    On a terminal this is one line that is drawn anew and goes away for a row of the table;
    elsewhere each step is a line, and progress inside a step is not shown.
    """

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self.stream = stream
        self.begin = time.monotonic()
        self.step = ""
        self.drawn = 0.0

    def say(self, step: str) -> None:
        """A step begins."""
        self.step = step
        if self.stream.isatty():
            self._draw(step)
        else:
            print(f"[{self.elapsed():>12}] {step}", file=self.stream, flush=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        """How far the step is."""
        if self.stream.isatty() and time.monotonic() - self.drawn > 0.1:
            self._draw(f"{self.step}: {what} {done}/{total}")

    def clear(self) -> None:
        """Make room for a line of the table."""
        if self.stream.isatty():
            print("\r\033[K", end="", file=self.stream, flush=True)

    def elapsed(self) -> str:
        """The time since the start, to read."""
        return duration(time.monotonic() - self.begin)

    def _draw(self, text: str) -> None:
        self.drawn = time.monotonic()
        line = f"[{self.elapsed():>12}] {text}"
        print(f"\r\033[K{line[:100]}", end="", file=self.stream, flush=True)


def header() -> str:
    """The names of the columns, over a rule."""
    names = row([name for name, _ in COLUMNS])
    return f"{names}\n{'-' * len(names)}"


def row(cells: Sequence[str]) -> str:
    """One line of the table: the first cell to the left, all others to the right."""
    first, *others = zip(cells, COLUMNS, strict=True)
    texts = [first[0].ljust(first[1][1])]
    texts += [cell.rjust(width) for cell, (_, width) in others]
    return "  ".join(texts).rstrip()
