"""The bounds of pyproject.toml and the releases of constraints.txt, read from these files alone."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
CONSTRAINTS_OLDEST = ROOT / "constraints-oldest.txt"
# What `make setup` installs, and as much of it as the contract tests need.
SETUP_EXTRAS = ("demo", "test", "lint", "docs")
TEST_EXTRAS = ("test",)
_BOUNDS = re.compile(r"([\w.-]+)>=([\w.]+),<([\w.]+)")
_OWN_EXTRAS = re.compile(r"panguq\[([\w,]+)\]")


@dataclass(frozen=True)
class Requirement:
    """A package and its bounds: `lowest` itself is allowed, `below` is not."""

    name: str
    lowest: str
    below: str

    def allows(self, release: str) -> bool:
        """Whether a release lies within the bounds."""
        return Version(self.lowest) <= Version(release) < Version(self.below)


def project() -> dict[str, object]:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(*extras: str) -> list[Requirement]:
    """panguq's dependencies and those of some extras, each once, extras of extras included.

    Raises ValueError for a requirement without both bounds.
    """
    table = project()
    optional: dict[str, list[str]] = table["optional-dependencies"]  # type: ignore[assignment]
    texts: list[str] = list(table["dependencies"])  # type: ignore[call-overload]
    waiting = list(extras)
    while waiting:
        for text in optional[waiting.pop(0)]:
            own = _OWN_EXTRAS.fullmatch(text)
            waiting += own[1].split(",") if own else []
            texts += [] if own else [text]
    return [_parse(text) for text in dict.fromkeys(texts)]


def lower_bounds(*extras: str) -> dict[str, str]:
    """The lowest release of each requirement but torch, which is chosen apart."""
    return {one.name: one.lowest for one in requirements(*extras) if one.name != "torch"}


def _parse(text: str) -> Requirement:
    bounds = _BOUNDS.fullmatch(text)
    if bounds is None:
        raise ValueError(f"pyproject.toml: {text!r} is not of the form name>=lowest,<below")
    return Requirement(*bounds.groups())


def constraints(path: Path = CONSTRAINTS) -> dict[str, str]:
    """The releases that a constraints file pins, by normalized name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): release.strip() for name, release in pins}


def constraints_without(names: Iterable[str]) -> str:
    """The text of a constraints file for all but these packages."""
    left_out = {canonicalize_name(name) for name in names}
    kept = {name: r for name, r in constraints().items() if name not in left_out}
    return "".join(f"{name}=={release}\n" for name, release in kept.items())
