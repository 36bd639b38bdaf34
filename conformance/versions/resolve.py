"""Write constraints.txt, and ask pip whether its releases exist for a Python that is not here."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from conformance.versions.environments import pip_install, say
from conformance.versions.requirements import (
    CONSTRAINTS,
    CONSTRAINTS_OLDEST,
    SETUP_EXTRAS,
    TEST_EXTRAS,
    Requirement,
    constraints,
    constraints_without,
    lower_bounds,
    requirements,
)

# Parts of one build of torch for GPUs, which differ from machine to machine.
TORCH_PARTS = ("nvidia-", "cuda-", "triton")
# Pure Python that its authors publish as source alone, for any Python; lm-eval needs them.
SOURCE_ONLY = ("rouge-score", "sqlitedict", "word2number")
HEADER = """\
# {what}
# Written by `make constraints`, on Linux for Python 3.11.
"""
WHAT = "What `make setup` installs, exactly: the releases that panguq was tested with."
WHAT_OLDEST = "What `make test-oldest` installs beside the lower bounds of pyproject.toml."


def write_constraints(torch: str) -> None:
    """Pin the newest releases within the bounds, and say which bounds they do not reach.

    Pins also what the lower bounds need in turn, so that neither set changes by itself.
    torch: a requirement as pip wants it; options after it do not count here.
    """
    torch = torch.split()[0]
    pins = resolve(torch, f".[{','.join(SETUP_EXTRAS)}]")
    _write(CONSTRAINTS, WHAT, pins)
    for one in loose_bounds(pins):
        print(f"{one.name}: {pins[canonicalize_name(one.name)]}, but the bound is <{one.below}")
    lowest = lower_bounds(*TEST_EXTRAS)
    direct = {canonicalize_name(name) for name in lowest}
    found = resolve(torch, *(f"{name}=={release}" for name, release in lowest.items()))
    beside = {name: r for name, r in found.items() if name not in {"torch", *direct}}
    _write(CONSTRAINTS_OLDEST, WHAT_OLDEST, beside)


def resolve(*wanted: str) -> dict[str, str]:
    """What pip would install for these requirements in an empty environment, without panguq."""
    say(f"asking pip for {' '.join(wanted)}")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        look_only = ("--dry-run", "--ignore-installed", "--report", str(report))
        pip_install(Path(sys.executable), *look_only, *wanted)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    metadata = [one["metadata"] for one in found]
    pins = {canonicalize_name(one["name"]): one["version"].partition("+")[0] for one in metadata}
    pins.pop("panguq", None)
    return {
        name: release for name, release in sorted(pins.items()) if not name.startswith(TORCH_PARTS)
    }


def _write(path: Path, what: str, pins: dict[str, str]) -> None:
    """Write a constraints file, and print what changes in it."""
    before = constraints(path) if path.exists() else {}
    lines = [f"{name}=={release}\n" for name, release in pins.items()]
    path.write_text(HEADER.format(what=what) + "".join(lines), encoding="utf-8")
    for name in sorted({*before, *pins}):
        if before.get(name) != pins.get(name):
            print(f"{path.name}: {name} {before.get(name, 'new')} -> {pins.get(name, 'gone')}")


def loose_bounds(pins: dict[str, str]) -> list[Requirement]:
    """Requirements whose upper bound is not the minor release after the one that is pinned.

    torch has builds of several GB: it is pinned to one that is small, and others are tried by hand.
    """
    return [
        one
        for one in requirements(*SETUP_EXTRAS)
        if one.name != "torch"
        and next_minor(pins[canonicalize_name(one.name)]) != Version(one.below)
    ]


def next_minor(release: str) -> Version:
    """The first release that was not tested: `2.13.0` gives 2.14."""
    tested = Version(release)
    return Version(f"{tested.major}.{tested.minor + 1}")


def check_python(version: str) -> None:
    """Raises Failed, with what pip said, for a pinned release without a wheel for this Python.

    Nothing is installed. torch is left out: its wheels for other Pythons are gigabytes, which pip
    would fetch to read them. The pins hold what each package needs, so pip need not follow that.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch) / "constraints.txt"
        pins.write_text(constraints_without(["torch"]), encoding="utf-8")
        look_only = ("--dry-run", "--no-deps", "--target", scratch, "--python-version", version)
        wheels = ("--only-binary", ":all:", "--no-binary", ",".join(SOURCE_ONLY))
        pip_install(Path(sys.executable), *look_only, *wheels, "-r", str(pins))
    say(f"Python {version}: every release in constraints.txt has a wheel; nothing was run there")
