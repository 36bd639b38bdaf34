"""A page as one file: the style and scripts that all share, its own script, and its data."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from panguq.errors import StorageError
from panguq.files.whole_file import output_file


def write_page(path: Path, title: str, script: str, data: Any) -> None:
    """Write the page that `script` draws from `data`. Raises StorageError if it cannot be."""
    with output_file(path, StorageError) as partial:
        partial.write_text(page_text(title, script, data), encoding="utf-8")


def page_text(title: str, script: str, data: Any) -> str:
    """The page. Whatever the data holds, a model's answers say, it is text there and never code."""
    filled = {
        "TITLE": title.replace("&", "&amp;").replace("<", "&lt;"),
        "STYLE": _part("page.css"),
        "SHARED": _part("page.js"),
        "SCRIPT": _part(script),
        "DATA": embedded(data),
    }
    text = _part("page.html")
    for name, value in filled.items():
        before, mark, after = text.partition(f"<!--{name}-->")
        assert mark, name
        text = before + value + after
    return text


def embedded(data: Any) -> str:
    """JSON that may stand in a script element: no `<` in it, which could end that."""
    said = json.dumps(data, ensure_ascii=False, allow_nan=False)
    escapes = {"<": "\\u003c", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    for character, escape in escapes.items():
        said = said.replace(character, escape)
    return said


def _part(name: str) -> str:
    return resources.files("panguq.pages").joinpath(name).read_text("utf-8")
