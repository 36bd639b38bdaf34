"""Globs over module paths: each is to match a matmul, for a glob that does not does nothing.

An ignore list that matches nothing quantizes what it was to spare, and nobody hears of it. So it is
an error, unless the glob is one that may (`Recipe.allow_unmatched`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import fx

from panguq.errors import RecipeError
from panguq.ir.expert_groups import paths_of
from panguq.passes.pipeline.base import matmuls
from panguq.suggest import nearest_names

AllowUnmatched: TypeAlias = bool | tuple[str, ...]
"""Whether globs may match nothing: all, none, or those listed."""

_LISTED = 8
_NEAREST = 3


def check_globs(
    what: str, globs: Iterable[str], gm: fx.GraphModule, allow_unmatched: AllowUnmatched = False
) -> None:
    """Raises RecipeError, with the nearest names, for a glob that matches no matmul of the graph.

    `what` says what the globs are for. `*` stands for whatever there is.
    """
    paths = [path for node in matmuls(gm) for path in paths_of(node)]
    for glob in globs:
        if glob != "*" and not matches(glob, paths) and not _may(glob, allow_unmatched):
            raise RecipeError(f"{what} {glob!r} matches no matmul of this model", hint(glob, paths))


def matches(glob: str, paths: Iterable[str]) -> bool:
    """Whether the glob matches one of the module paths."""
    return any(fnmatchcase(path, glob) for path in paths)


def hint(glob: str, paths: Sequence[str]) -> str:
    """Globs that do match and are like this one; and what there is."""
    likely = [g for g in (f"{glob}.*", f"*{glob}", f"*.{glob}", f"*{glob}*") if matches(g, paths)]
    near = likely[:1] or nearest_names(glob, _candidates(paths), _NEAREST)
    question = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    more = f" … ({len(paths)} in all)" if len(paths) > _LISTED else ""
    there = f"the matmuls are {', '.join(paths[:_LISTED])}{more}" if paths else "it has no matmul"
    return f"{question}{there}; allow_unmatched=True (--allow-unmatched) lets a glob match nothing"


def _candidates(paths: Sequence[str]) -> list[str]:
    leaves = dict.fromkeys(f"*.{path.rpartition('.')[2]}" for path in paths if "." in path)
    return [*leaves, *paths]


def _may(glob: str, allow_unmatched: AllowUnmatched) -> bool:
    return allow_unmatched if isinstance(allow_unmatched, bool) else glob in allow_unmatched
