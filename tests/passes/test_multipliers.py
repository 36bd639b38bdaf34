"""Models that multiply by constants between their layers: passes move scales past these.

Granite multiplies embeddings, both branches, scores and logits; Cohere its logits; Gemma its
embeddings, and it normalizes a branch before it is added.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

from panguq.data.inputs import prepare
from panguq.ir.edit import clone
from panguq.ir.interface import Interface
from panguq.ir.run.interpret import run
from panguq.passes.pipeline.base import PassContext
from panguq.passes.rotate import Rotate
from panguq.passes.smoothquant import SmoothQuant
from panguq.tensors.weight_store import WeightStore
from panguq.tracing import trace
from tests.families.models import make
from tests.families.sweep import CALIBRATION, IDS
from tests.model_shelf import run_passes

SETTINGS: dict[str, dict[str, Any]] = {
    "granite": dict(attention_multiplier=0.3),
    "cohere": dict(logit_scale=0.25),
    "gemma2": {},
    "gemma3_text": {},
}
VALUES = dict(value=2)
NORMED = dict(norm_linear=4, value_output=2, up_down=2)
SITES = {
    ("granite", "rotate"): dict(residual=1, value=2),
    ("cohere", "rotate"): VALUES,
    ("gemma2", "rotate"): VALUES,
    ("gemma3_text", "rotate"): VALUES,
    ("granite", "smoothquant"): NORMED | dict(norm_linear=5),
    ("cohere", "smoothquant"): NORMED | dict(norm_linear=2),
    ("gemma2", "smoothquant"): NORMED,
    ("gemma3_text", "smoothquant"): NORMED,
}


@functools.cache
def traced(family: str) -> tuple[Any, fx.GraphModule, Interface]:
    model = make(family, **SETTINGS[family])
    return model, *trace(model, None, None)


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("step", [Rotate(), SmoothQuant()], ids=["rotate", "smoothquant"])
def test_the_function_stays_the_same(family: str, step: Any) -> None:
    model, graph, interface = traced(family)
    batches = [prepare(interface, ids) for ids in CALIBRATION]
    ctx = PassContext(interface, WeightStore(), batches=batches, probe=batches[0])
    gm = clone(graph)
    record = run_passes(gm, ctx, "W8A8_DYNAMIC", step)[-1]
    assert record.proved_difference is not None
    with torch.no_grad():
        expected = model(IDS).logits
    actual = run(gm, prepare(interface, IDS))[0]
    assert (expected - actual).abs().max() < 1e-5 * expected.abs().max()
    table = record.result.tables["rotations" if isinstance(step, Rotate) else "scales"]
    kinds = Counter(dict(zip(table.columns, row, strict=True))["kind"] for row in table.rows)
    assert kinds == SITES[family, step.name]
    if step.name == "rotate" and "residual" not in kinds:  # which says why
        reasons = {skip.reason for skip in record.result.skipped if "norm" in skip.node}
        assert reasons, record.result.skipped
