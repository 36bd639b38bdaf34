"""Whether the installed torch and transformers are releases that panguq was tested with."""

from __future__ import annotations

import re
import warnings
from importlib import metadata

# All else that panguq depends on promises not to change under it; these two are looked into.
_WATCHED = ("torch", "transformers")


def warn_of_untested() -> None:
    """Warn of releases outside the bounds that panguq itself was installed with.

    pip keeps to those bounds, so this is for who has told it not to. Reads only metadata: neither
    package is imported.
    """
    try:
        needs = metadata.requires("panguq") or []
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return
    bounds = {need[1]: need[2] for need in map(_NEED.match, needs) if need}
    for name in _WATCHED:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:  # the import that follows says so
            continue
        bound = bounds.get(name, "")
        if not within(found, bound):
            warnings.warn(
                f"{name} {found} is installed, and panguq was tested with {bound} only; if"
                f" something does not work, try pip install '{name}{bound}'",
                stacklevel=3,
            )


_NEED = re.compile(r"([\w.-]+)\s*\(?([<>=][^;)]*)")


def within(release: str, bound: str) -> bool:
    """Whether a release keeps to a bound like `<5.25,>=5.20`; a release to come is its number."""
    for operator, limit in re.findall(r"(<|>=)\s*([\d.]+)", bound):
        below = _numbers(release) < _numbers(limit)
        if below != (operator == "<"):
            return False
    return True


def _numbers(release: str) -> list[int]:
    """`5.25.0.dev0` as [5, 25], to be compared."""
    leading = re.match(r"[\d.]*", release)
    numbers = [int(part) for part in (leading[0] if leading else "").split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers
