"""Run a pass that failed once more, on what the dump says it was given."""

from __future__ import annotations

from torch import fx

from panguq import registry
from panguq.dumps import node_metadata
from panguq.dumps.files import COMPILE_AGAIN, PROBE, STAGE_JSON, StageInfo
from panguq.dumps.reader import DumpReader
from panguq.errors import StorageError
from panguq.ir.properties import Property
from panguq.ir.text.value_types import restore_types
from panguq.pass_options import make_pass
from panguq.passes.pipeline.base import Pass, PassContext
from panguq.passes.pipeline.module_globs import AllowUnmatched
from panguq.passes.pipeline.runner import Runner
from panguq.tensors.weight_store import WeightStore


def rerun_failed(reader: DumpReader, stage: str) -> fx.GraphModule:
    """The graph after the failed pass, if it goes well this time; else what it raises."""
    info = reader.stage(stage)
    step = _pass_of(reader, stage, info)
    gm = reader.graph(stage)
    restore_types(gm, reader.info.interface)
    if info.metadata is not None:
        node_metadata.restore(gm, info.metadata, reader.metadata(stage))
    traced = reader.graph(reader.stages[0])
    restore_types(traced, reader.info.interface)
    ctx = PassContext(
        interface=reader.info.interface,
        store=WeightStore(),
        batches=reader.batches(stage),
        probe=reader.probe() if (reader.path / PROBE).exists() else None,
        seed=reader.info.seed,
        reference=traced,
        allow_unmatched=_allow_unmatched(reader),
    )
    held = frozenset(held for held in Property if held.name in info.holds)
    Runner(ctx, held=held, first_index=info.index).run(gm, [step])
    return gm


def _allow_unmatched(reader: DumpReader) -> AllowUnmatched:
    found = reader.info.recipe.get("allow_unmatched", False)
    return tuple(map(str, found)) if isinstance(found, list) else found is True


def _pass_of(reader: DumpReader, stage: str, info: StageInfo) -> Pass:
    known = {kind.name: kind for kind in registry.all_passes()}
    if info.name not in known:
        raise StorageError(
            f"{reader.path / stage / STAGE_JSON}: this panguq has no pass {info.name}",
            "import what adds the pass, or read the graph that it was given with `panguq show`",
        )
    where = f"{reader.path / stage / STAGE_JSON}: {info.name}"
    if not isinstance(info.options, dict):
        raise StorageError(f"{where} has no options", COMPILE_AGAIN)
    return make_pass(known[info.name], info.options, where)
