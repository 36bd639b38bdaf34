"""Find the first pass, and the first rewrite inside it, that spoiled the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, fx

from panguq.decibels import finite_db, spelled
from panguq.dumps.reader import DumpReader
from panguq.dumps.replay import probe_for, reference_stage
from panguq.dumps.stage_checks import exact_faults, float_values, lossy_quality
from panguq.errors import StorageError
from panguq.ir.run import interpret

Verdict = Literal["clean", "below_floor", "largest_drop", "not_exact", "float_not_finite"]


class StageQuality(BaseModel):
    """What was found in one stage: its worst node, or why it could not be looked at."""

    model_config = ConfigDict(frozen=True)
    stage: str
    exact: bool
    compared: int = 0
    worst_db: float | None = None
    worst_node: str | None = None
    note: str = ""


class BisectResult(BaseModel):
    """The culprit, if there is one: `node` (a matmul, as a rule) as `stage` left it.

    `db` is the node's local SQNR in that stage and `before_db` in the stage before, each fed the
    values of the float graph `reference`; 999 dB stands for equal, -999 for not finite.
    `verdict`: an exact pass changed values; a node fell below the floor; without a floor, the
    node whose noise grew most in one pass; the float graph itself is not finite; or clean.
    """

    model_config = ConfigDict(frozen=True)
    clean: bool
    verdict: Verdict
    reference: str
    floor_db: float | None = None
    stage: str | None = None
    node: str | None = None
    db: float | None = None
    before_db: float | None = None
    stages: tuple[StageQuality, ...] = ()

    def render(self) -> str:
        """As text."""
        width = max((len(entry.stage) for entry in self.stages), default=0)
        lines = [self._sentence(), ""]
        for entry in self.stages:
            found = entry.note or ("exact" if entry.exact else "equal to the float graph")
            if entry.worst_db is not None and entry.worst_db < 999.0:
                found = f"worst {spelled(entry.worst_db)}: {entry.worst_node}"
            lines.append(f"{entry.stage:<{width}}  {found}")
        return "\n".join(lines) + "\n"

    def _sentence(self) -> str:
        if self.verdict == "clean":
            floor = "" if self.floor_db is None else f" and no node is below {self.floor_db:g} dB"
            return f"Clean: every exact pass is exact{floor or ' and nothing else changed'}."
        if self.verdict == "float_not_finite":
            return (
                f"The float graph {self.reference} itself yields NaN or Inf, first at {self.node}."
            )
        where = f"{self.stage}: {self.node}"
        if self.verdict == "not_exact":
            return f"{where} is changed by a pass that must be exact: {_change(self)}."
        change = f"local SQNR {_change(self)}"
        if self.verdict == "below_floor":
            return f"{where} is the first below {self.floor_db:g} dB: {change}."
        return f"{where} lost most in one pass: {change}."


def bisect(reader: DumpReader, floor_db: float | None = None) -> BisectResult:
    """The first node below `floor_db`, first by pass, then in the order of the graph.

    Without a floor, the node whose noise (its power relative to the signal's) grew most in one
    pass; in dB the first lossy pass would always win, since it starts from no noise at all.
    A pass that must be exact and is not is found in either case. Raises StorageError.
    """
    search = _Search(reader, floor_db)
    broken = search.broken_float_node()
    if broken is not None:
        return search.result(
            _Culprit("float_not_finite", search.reference, broken, -math.inf, -math.inf)
        )
    for stage in reader.whole_stages[1:]:
        culprit = search.look_at(stage)
        if culprit is not None:
            return search.result(culprit)
    return search.result(search.largest if floor_db is None else None)


@dataclass(frozen=True)
class _Culprit:
    verdict: Verdict
    stage: str
    node: str
    db: float
    before_db: float
    growth: float = 0.0


class _Search:
    """Goes through the stages in order; `largest` is the largest growth of noise so far."""

    def __init__(self, reader: DumpReader, floor_db: float | None) -> None:
        self.reader = reader
        self.floor_db = floor_db
        self.reference = reference_stage(reader)
        self.largest: _Culprit | None = None
        self.before: fx.GraphModule | None = None
        self.stages: list[StageQuality] = []
        self.latest: dict[str, float] = {}
        self.values: Mapping[str, Tensor] | None = None

    def broken_float_node(self) -> str | None:
        """The float graph's first node that is not finite, if its output is not."""
        gm = self.reader.graph(self.reference)
        probe = probe_for(self.reader, gm)
        if bool(interpret.run(gm, probe)[0].isfinite().all()):
            return None
        return interpret.first_non_finite(gm, probe)

    def look_at(self, stage: str) -> _Culprit | None:
        """Compare one stage; what ends the search, if anything."""
        before, self.before = self.before or self._graph_before(stage), self.reader.graph(stage)
        if self.reader.stage(stage).exact:
            return self._exact(stage, before, self.before)
        return self._lossy(stage, self.before)

    def result(self, found: _Culprit | None) -> BisectResult:
        """The search's end."""
        return BisectResult(
            clean=found is None,
            verdict=found.verdict if found else "clean",
            reference=self.reference,
            floor_db=self.floor_db,
            stage=found.stage if found else None,
            node=found.node if found else None,
            db=finite_db(found.db) if found else None,
            before_db=finite_db(found.before_db) if found else None,
            stages=tuple(self.stages),
        )

    def _graph_before(self, stage: str) -> fx.GraphModule | None:
        names = self.reader.whole_stages
        try:
            return self.reader.graph(names[names.index(stage) - 1])
        except StorageError:
            if self.reader.stage(names[0]).unsaved:  # a trace may hold ops that no file can name
                return None
            raise

    def _exact(
        self, stage: str, before: fx.GraphModule | None, after: fx.GraphModule
    ) -> _Culprit | None:
        if before is None:
            note = "not compared: the trace could not be saved"
            self.stages.append(StageQuality(stage=stage, exact=True, note=note))
            return None
        probes = (probe_for(self.reader, before), probe_for(self.reader, after))
        info = self.reader.stage(stage)
        count, faults = exact_faults(before, after, probes, info.sites, info.renamed)
        node = next(iter(faults), None)
        entry = StageQuality(stage=stage, exact=True, compared=count)
        if node is None:
            self.stages.append(entry)
            return None
        found = {"worst_db": finite_db(faults[node]), "worst_node": node}
        self.stages.append(entry.model_copy(update=found))
        return _Culprit("not_exact", stage, node, faults[node], math.inf)

    def _lossy(self, stage: str, gm: fx.GraphModule) -> _Culprit | None:
        probe = probe_for(self.reader, gm)
        if self.values is None:
            self.values = float_values(self.reader.graph(self.reference), probe)
        found = lossy_quality(gm, probe, self.values)
        worst = min(found, key=lambda name: found[name], default=None)
        self.stages.append(
            StageQuality(
                stage=stage,
                exact=False,
                compared=len(found),
                worst_db=finite_db(found[worst]) if worst else None,
                worst_node=worst,
            )
        )
        before, self.latest = self.latest, found
        for node, db in found.items():
            earlier = before.get(node, math.inf)
            growth = _noise(db) - _noise(earlier)
            if self.floor_db is not None and db < self.floor_db:
                return _Culprit("below_floor", stage, node, db, earlier)
            if growth > (self.largest.growth if self.largest else 0.0):
                self.largest = _Culprit("largest_drop", stage, node, db, earlier, growth)
        return None


def _noise(db: float) -> float:
    """Noise power relative to the signal's."""
    return 10 ** (-db / 10) if db > -3000 else math.inf


def _change(result: BisectResult) -> str:
    before = spelled(result.before_db if result.before_db is not None else 999.0)
    return f"{before} before, {spelled(result.db or 0.0)} after"
