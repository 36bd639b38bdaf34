"""Figures that a benchmark prints, or writes into a page of the manual between two marks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def print_or_write(description: str, figures: Callable[[], str], begin: str, end: str) -> None:
    """The command line of such a benchmark: `--docs PAGE` replaces what is between the marks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--docs", type=Path, help="the page whose figures to replace")
    options = parser.parse_args()
    text = figures()
    if options.docs is None:
        print(text)
        return
    page = options.docs.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    options.docs.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    print(f"wrote {options.docs}")
