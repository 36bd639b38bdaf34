"""Did you mean …? The answer to a name that nothing has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known name most like the given one, or None if none is like it.

    Case does not count, nor whether words are joined by `-` or `_`.
    """
    near = nearest_names(given, known, 1)
    return near[0] if near else None


def nearest_names(given: str, known: Iterable[str], most: int) -> list[str]:
    """At most so many known names that are like the given one, the most like first."""
    by_folded = {_fold(name): name for name in known}
    near = difflib.get_close_matches(_fold(given), by_folded, n=most, cutoff=0.6)
    return [by_folded[name] for name in near]


def did_you_mean(given: str, known: Iterable[str], kind: str) -> str:
    """A hint such as `did you mean alpha? The options are alpha, sites`.

    `kind` says in the plural what the names are: "options", "passes", "presets".
    """
    names = list(known)
    if not names:
        return f"there are no {kind}"
    near = nearest(given, names)
    question = f"did you mean {near}? " if near else ""
    return f"{question}The {kind} are {', '.join(names)}"


def _fold(name: str) -> str:
    return name.casefold().replace("_", "-")
