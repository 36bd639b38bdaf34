"""The passes of a compile, in order and in three parts: made once, from a recipe and a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from panguq.ir.properties import Property
from panguq.lowering.stages import fitting, lowering_passes
from panguq.passes.base import Pass
from panguq.passes.pipeline import check_order
from panguq.recipe import Recipe
from panguq.registry import ALL_PASSES


@dataclass(frozen=True)
class Schedule:
    """The passes of one compile.

    implied: those that every recipe begins with: the canonical graph, and the recipe's schemes.
    fitting: a scheme for every matmul that the target can run. Up to here no data is needed.
    calibrated: the passes that the recipe lists; some of them need data.
    lowering: from the fake-quant graph to the target's kernels.
    """

    implied: tuple[Pass, ...]
    fitting: tuple[Pass, ...]
    calibrated: tuple[Pass, ...]
    lowering: tuple[Pass, ...]

    @classmethod
    def of(cls, recipe: Recipe, target: str) -> Schedule:
        """The schedule of a compile. Raises LoweringError for an unknown target."""
        return cls(
            implied=recipe.implied(),
            fitting=tuple(fitting(target, recipe.ascend)),
            calibrated=recipe.passes,
            lowering=tuple(lowering_passes(target, recipe.precision, recipe.ascend)),
        )

    @property
    def described(self) -> tuple[Pass, ...]:
        """What is decided without data."""
        return (*self.implied, *self.fitting)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All passes, in the order in which they run."""
        return (*self.described, *self.calibrated, *self.lowering)

    @property
    def needs_calibration(self) -> bool:
        """Whether a pass reads calibration data."""
        return any(step.needs_calibration for step in self.passes)

    def check_order(self) -> None:
        """Raises RecipeError if a pass needs what nothing before it has established."""
        check_passes(self.passes)


def check_passes(passes: Sequence[Pass], have: frozenset[Property] = frozenset()) -> None:
    """Raises RecipeError, naming what to put before it, for a pass that comes too early."""
    check_order(passes, have, ALL_PASSES)
