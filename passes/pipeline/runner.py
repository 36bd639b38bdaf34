"""The check of the order of passes, and the runner that every pass goes through."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from torch import fx

from panguq.errors import NumericsError, RecipeError
from panguq.ir.edit import clone, finish, weights_of
from panguq.ir.properties import TRACED, Property
from panguq.ir.run.equivalence import Once, prove_site, prove_whole
from panguq.ir.text.printer import print_graph
from panguq.ir.verify import verify
from panguq.passes.pipeline.base import Pass, PassContext, PassResult
from panguq.ranks import ranks
from panguq.tensors.memory import release_free_memory

logger = logging.getLogger("panguq")
WORTH_RELEASING_BYTES = 64 << 20  # looking for garbage costs half a second in a large process


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran: its place, what it did, how long it took, and its proof if exact."""

    index: int
    step: Pass
    result: PassResult
    seconds: float
    proved_difference: float | None = None

    @property
    def folder(self) -> str:
        """The name under which dumps show this pass: `02_smoothquant`."""
        return f"{self.index:02d}_{self.step.name}"


class Instrument(Protocol):
    """Something that watches a pipeline. No pass knows of it."""

    def before_pass(self, index: int, step: Pass, gm: fx.GraphModule) -> None:
        """Called before each pass."""

    def after_pass(self, record: PassRecord, gm: fx.GraphModule) -> None:
        """Called after each pass, once its graph is verified."""

    def failed_pass(self, index: int, step: Pass, error: BaseException) -> None:
        """Called instead of `after_pass` when a pass, its proof or its check raises."""


def check_order(
    passes: Sequence[Pass],
    have: frozenset[Property] = TRACED,
    known: Sequence[type[Pass]] = (),
) -> None:
    """Raises RecipeError if a pass needs a property that nothing before it has established.

    `known` are the passes of which the hint names those that establish it.
    """
    held, broken_by = set(have), dict[Property, str]()
    for index, step in enumerate(passes, start=1):
        for needed in sorted(step.needs(passes[: index - 1]) - held, key=lambda p: p.name):
            culprit = broken_by.get(needed)
            cause = f", and {culprit} broke it" if culprit else ""
            raise RecipeError(
                f"pass {index:02d} {step.name} needs {needed.name}{cause}",
                _what_to_do(step, needed, culprit, held, known),
            )
        held = (held - step.breaks) | step.establishes
        broken_by.update({p: f"pass {index:02d} {step.name}" for p in step.breaks})


def _what_to_do(
    step: Pass,
    needed: Property,
    culprit: str | None,
    held: Set[Property],
    known: Sequence[type[Pass]],
) -> str:
    """What to put before the pass; or, where nothing may come there any more, to put it earlier."""
    makers = [p for p in known if needed in p.establishes]
    possible = [p for p in makers if p.requires <= held]
    if culprit and not possible:
        return f"{needed.name}: {needed.value}; put {step.name} before {culprit}, or leave one out"
    names = [p.name for p in possible or makers]
    return f"put {' or '.join(names)} before it" if names else ""


class Runner:
    """Runs passes in order on a graph, proving exact ones and verifying after each.

    `held` are the properties that hold and `next_index` is the next pass's place; a run goes on
    where the one before it stopped. Without `prove` no exact pass is proved: a proof reads weights,
    which a skeleton has not. `once` may know a proof's result from an earlier run.
    """

    def __init__(
        self,
        ctx: PassContext,
        instruments: Sequence[Instrument] = (),
        held: frozenset[Property] = TRACED,
        first_index: int = 1,
        prove: bool = True,
        once: Once = lambda what, graphs, check: check(*graphs),
    ) -> None:
        self.ctx = ctx
        self.instruments = instruments
        self.held = held
        self.next_index = first_index
        self.prove = prove
        self.once = once

    def run(self, gm: fx.GraphModule, passes: Sequence[Pass]) -> list[PassRecord]:
        """A record of every pass. Raises RecipeError, before any has run, if the order is wrong."""
        check_order(passes, self.held)
        records = []
        for step, following in zip_longest(passes, passes[1:]):
            self.ctx.following = following
            records.append(self._run_one(gm, step))
        return records

    def _run_one(self, gm: fx.GraphModule, step: Pass) -> PassRecord:
        index = self.next_index
        for instrument in self.instruments:
            instrument.before_pass(index, step, gm)
        try:
            record = self._rewrite(index, step, gm)
        except BaseException as error:
            for instrument in self.instruments:
                instrument.failed_pass(index, step, error)
            if isinstance(error, NumericsError):
                seen = f"{error.message}; first seen by pass {index:02d} {step.name}"
                raise NumericsError(seen, error.hint) from error
            raise
        self.held = (self.held - step.breaks) | step.establishes
        self.next_index += 1
        for instrument in self.instruments:
            instrument.after_pass(record, gm)
        return record

    def _rewrite(self, index: int, step: Pass, gm: fx.GraphModule) -> PassRecord:
        self.ctx.pass_label = f"{index:02d}_{step.name}"
        before = clone(gm) if step.exact and self.prove else None
        if step.needs_calibration and not step.divided and ranks().count > 1:
            logger.info("%s is not divided: rank 0 does the work alone", self.ctx.pass_label)
        started = time.perf_counter()
        seen = self.ctx.statistics
        result = step.run(gm, self.ctx)
        if self.ctx.statistics is seen:  # of the graph as it was before this pass
            self.ctx.statistics = None
        finish(gm)
        proved = None if before is None else self._proved(before, gm, result)
        holds = (self.held - step.breaks) | step.establishes
        verify(gm, holds, after=f"pass {index:02d} {step.name}")
        if sum(t.nbytes for t in weights_of(gm).values()) >= WORTH_RELEASING_BYTES:
            release_free_memory()
        return PassRecord(index, step, result, time.perf_counter() - started, proved)

    def _proved(self, before: fx.GraphModule, after: fx.GraphModule, result: PassResult) -> float:
        def prove(before: fx.GraphModule, after: fx.GraphModule) -> float:
            return _prove(before, after, result, self.ctx)

        return self.once(self.ctx.pass_label, (before, after), prove)


def _prove(
    before: fx.GraphModule, after: fx.GraphModule, result: PassResult, ctx: PassContext
) -> float:
    """The largest difference that an exact pass made, in float64, over its sites."""
    if result.sites:
        return max(
            prove_site(
                before, after, site.inputs, site.outputs, ctx.generator(), site.turned, site.sizes
            )
            for site in result.sites
        )
    if _same_graph(before, after):
        return 0.0
    return prove_whole(before, after, ctx.generator())


def _same_graph(before: fx.GraphModule, after: fx.GraphModule) -> bool:
    def text(gm: fx.GraphModule) -> list[str]:
        return [line.split("  # ")[0] for line in print_graph(gm).splitlines()]  # no schemes

    if text(before) != text(after):
        return False
    old, new = weights_of(before), weights_of(after)
    return old.keys() == new.keys() and all(old[name] is new[name] for name in old)
