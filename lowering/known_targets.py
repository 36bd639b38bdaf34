"""All targets: panguq's own, and those that a user's module adds."""

from __future__ import annotations

from panguq.errors import LoweringError
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.chips import CHIPS
from panguq.lowering.ascend.target import targets_of
from panguq.lowering.cpu.target import CPU
from panguq.lowering.reference.target import REFERENCE
from panguq.lowering.target import Target, check_target
from panguq.suggest import did_you_mean

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (CPU, *(part for chip in CHIPS.values() for part in targets_of(chip)), REFERENCE)
}
"""Panguq's own by name, and those that were added."""


def add_target(target: Target) -> Target:
    """Let compiles, plans, explanations and target files know a target; returns it.

    Raises LoweringError for a name that is taken or would be read as a file's, and for numbers
    that cannot be.
    """
    name = target.name
    if name in TARGETS:
        raise LoweringError(f"there is a target {name!r} already", "give it another name")
    if not name or is_path(name):
        raise LoweringError(
            f"{name!r} is no name for a target: it would be read as a file's",
            "leave out slashes, and .yaml, .yml or .json at the end",
        )
    TARGETS[name] = check_target(target, f"target {name}")
    return target


def add_chip(chip: Chip) -> tuple[Target, ...]:
    """Let kernels take a chip's tiles, and add a target for each of its parts; returns these.

    Raises LoweringError for a kind or a name that is taken.
    """
    if chip.kind in CHIPS:
        raise LoweringError(f"there is a chip {chip.kind!r} already", "give it another kind")
    added = tuple(add_target(target) for target in targets_of(chip))
    CHIPS[chip.kind] = chip
    return added


def is_path(name: str) -> bool:
    """Whether this names a target file: it ends in .yaml, .yml or .json, or contains a slash."""
    return "/" in name or name.endswith((".yaml", ".yml", ".json"))


def known_targets() -> tuple[Target, ...]:
    """All of them; a kind's first one stands for the kind."""
    return tuple(TARGETS.values())


def first_of_kind(kind: object, source: str) -> Target:
    """A target of this kind. Raises LoweringError, with the nearest kind, if there is none."""
    kinds = {target.kind: target for target in reversed(known_targets())}
    if not isinstance(kind, str) or kind not in kinds:
        raise LoweringError(
            f"{source}: kind: {kind!r} is no kind of target",
            did_you_mean(str(kind), list(reversed(kinds)), "kinds"),
        )
    return kinds[kind]
