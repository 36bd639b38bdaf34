"""The passes of a compile, in order and in three parts: made once, from a recipe and a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from panguq.ir.properties import TRACED, Property
from panguq.lowering.stages import check_formats, fitting, lowering_passes
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.pipeline.base import Pass
from panguq.passes.pipeline.module_globs import check_globs
from panguq.passes.pipeline.runner import check_order
from panguq.recipe import Recipe
from panguq.registry import all_passes


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
    target: str

    @classmethod
    def of(cls, recipe: Recipe, target: str) -> Schedule:
        """The schedule of a compile. Raises LoweringError for an unknown target."""
        return cls(
            implied=recipe.implied(),
            fitting=tuple(fitting(target, recipe.ascend)),
            calibrated=recipe.passes,
            lowering=tuple(lowering_passes(target, recipe.precision, recipe.ascend)),
            target=target,
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

    @property
    def assign(self) -> AssignSchemes:
        """The pass that gives every matmul the recipe's scheme."""
        return next(step for step in self.implied if isinstance(step, AssignSchemes))

    def check_described(self, gm: fx.GraphModule, allow_unmatched: bool | tuple[str, ...]) -> None:
        """Raises RecipeError for a pass's glob that matches no matmul of the described graph, and
        for a matmul of it that a pass cannot take."""
        for step in self.calibrated:
            check_globs(step.name, step.globs, gm, allow_unmatched)
        self.check_matmuls(gm)

    def check_matmuls(self, gm: fx.GraphModule) -> None:
        """Raises RecipeError for a matmul of the described graph that a pass cannot take, up to the
        first pass that gives matmuls other schemes."""
        for step in self.calibrated:
            if step.given_schemes:
                return
            step.check_matmuls(gm)

    def check_formats(self) -> None:
        """Raises LoweringError for a scheme whose number format the target has no kernel for."""
        check_formats(self.passes, self.target)

    def check_order(self) -> None:
        """Raises RecipeError if a pass needs what nothing before it has established."""
        check_passes(self.passes)


def check_passes(passes: Sequence[Pass], have: frozenset[Property] = TRACED) -> None:
    """Raises RecipeError, naming what to put before it, for a pass that comes too early."""
    check_order(passes, have, all_passes())
