"""Targets by name, or from files."""

from __future__ import annotations

from pathlib import Path

from panguq.errors import LoweringError
from panguq.lowering.known_targets import TARGETS as TARGETS
from panguq.lowering.known_targets import add_chip as add_chip
from panguq.lowering.known_targets import add_target as add_target
from panguq.lowering.known_targets import is_path
from panguq.lowering.known_targets import known_targets as known_targets
from panguq.lowering.target import Target
from panguq.lowering.target_files import load_target
from panguq.suggest import did_you_mean


def find_target(name_or_path: str | Path) -> Target:
    """A target by name, or the target in a YAML or JSON file.

    What ends in .yaml, .yml or .json, or contains a slash, is a file. Raises LoweringError: for a
    name that no target has, with the nearest; for a file that is damaged, naming the constant.
    """
    name = str(name_or_path)
    if name in TARGETS:
        return TARGETS[name]
    if isinstance(name_or_path, Path) or is_path(name):
        return load_target(Path(name_or_path), reserved=[n for n in TARGETS if n != "cpu"])
    raise LoweringError(f"unknown target {name!r}", did_you_mean(name, TARGETS, "targets"))
