"""For the site alone: lines `name: what it is` of a docstring become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^(\w+): (.*(?:\n    .+)*)$", re.MULTILINE)


def as_list(text: str) -> str:
    """The docstring in Markdown. One with a single such line has prose with a colon in it."""
    return _ARGUMENT.sub(r"- `\1`: \2", text) if len(_ARGUMENT.findall(text)) > 1 else text


class ArgumentLists(griffe.Extension):
    """Rewrites the docstrings of functions before they are rendered."""

    def on_function(self, *, func: griffe.Function, **unused: Any) -> None:
        """Called for each function, once it is loaded."""
        if func.docstring is not None:
            func.docstring.value = as_list(func.docstring.value)
