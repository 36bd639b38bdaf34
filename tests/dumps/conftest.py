"""A tiny language model, dumped through the same pipeline that `compile` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

from panguq.compile_data import CompileData
from panguq.data.calibration import causal_lm_batches, probe_of
from panguq.dumps.dump import Dump
from panguq.dumps.reader import DumpReader
from panguq.ir.edit import clone
from panguq.ir.interface import Interface
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.passes.pipeline.base import Pass, PassContext
from panguq.passes.pipeline.runner import PassRecord
from panguq.recipe import Recipe
from panguq.report.quality import Quality
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import run_pipeline

Traced = tuple[LlamaForCausalLM, fx.GraphModule, Interface]


class Recorder:
    """An instrument that keeps the graph after every pass."""

    def __init__(self) -> None:
        self.graphs: dict[str, fx.GraphModule] = {}

    def before_pass(self, index: int, step: Pass, gm: fx.GraphModule) -> None: ...

    def after_pass(self, record: PassRecord, gm: fx.GraphModule) -> None:
        self.graphs[record.folder] = clone(gm)

    def failed_pass(self, index: int, step: Pass, error: BaseException) -> None: ...


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def traced() -> Traced:
    model = tiny_llama()
    return model, *trace_causal_lm(model)


Dumper = Callable[..., tuple[DumpReader, Dump, dict[str, fx.GraphModule]]]


@pytest.fixture(scope="session")
def dump_into(traced: Traced) -> Dumper:
    """`dump_into(folder, recipe, extra)`: run it with `extra` passes before the lowering."""

    def run(
        folder: Path,
        recipe: str = "w8a8",
        extra: Sequence[Pass] = (),
        given: Traced = traced,
        at: int | None = None,
    ) -> tuple[DumpReader, Dump, dict[str, fx.GraphModule]]:
        model, graph, interface = given
        gm = clone(graph)
        ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
        ctx = PassContext(interface, WeightStore())
        ctx.batches = causal_lm_batches(ids, interface)
        ctx.probe = probe_of(ctx.batches, interface)
        chosen = Recipe.of(recipe)
        quality, recorder = Quality(ctx), Recorder()
        dump = Dump.open(folder, chosen, 0, "cpu", ctx, quality.summaries)
        assert dump is not None
        dump.traced(gm, model)
        steps = list(chosen.build())
        at = len(steps) if at is None else at
        steps[at:at] = extra
        run_pipeline(gm, [*steps, LowerMatmuls()], ctx, [quality, dump, recorder])
        used = CompileData(nn.Module(), None, 0, None, None, calibrated=True)
        dump.close(quality.report("cpu", gm, recorder.graphs[list(recorder.graphs)[-2]], used))
        return DumpReader(folder), dump, recorder.graphs

    return run


@pytest.fixture(scope="session")
def w8a8(
    dump_into: Dumper, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DumpReader, dict[str, fx.GraphModule]]:
    """A dump that tests only read."""
    reader, _, graphs = dump_into(tmp_path_factory.mktemp("dumps") / "w8a8")
    return reader, graphs
