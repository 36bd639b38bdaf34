"""A mixture of experts from model to compiled model."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import panguq
from panguq.errors import TraceError
from panguq.ir.edit import module_path
from panguq.ir.node_meta import scheme_of
from panguq.ir.views import ExpertLinear
from panguq.passes.pipeline.base import matmuls
from tests.families.models import make
from tests.families.sweep import CALIBRATION


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make("qwen3_moe")


def test_the_graph_shows_one_matmul_of_all_experts(model) -> None:
    compiled = panguq.compile(model, "float")
    nodes = [n for n in matmuls(compiled.graph) if ExpertLinear.match(n) is not None]
    names = [f"model.layers.{i}.mlp.experts.{w}_proj" for i in (0, 1) for w in ("gate_up", "down")]
    assert [module_path(n) for n in nodes] == names
    assert [(ExpertLinear.of(n).experts, *ExpertLinear.of(n).shape) for n in nodes] == [
        (4, 128, 128), (4, 128, 64),
    ] * 2  # fmt: skip


def test_routers_stay_float_and_the_report_says_why(model) -> None:
    compiled = panguq.compile(model, "w8a8-dynamic", calibration=CALIBRATION)
    schemes = {module_path(n): scheme_of(n).name for n in matmuls(compiled.graph)}
    assert {schemes[f"model.layers.{i}.mlp.gate"] for i in (0, 1)} == {"FLOAT"}
    (said,) = (w for w in compiled.report.warnings if "a choice follows" in w)
    assert "model.layers.*.mlp.gate (2)" in said and "topk" in said


class Loop(nn.Module):
    """Experts of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x) + self.experts[1](x)


def test_experts_of_an_unknown_kind_are_refused_by_name(model) -> None:
    other = make("qwen3_moe")
    other.model.layers[1].mlp = Loop()
    for command in (panguq.compile, panguq.plan):
        with pytest.raises(TraceError, match=r"model\.layers\.1\.mlp\.experts \(ModuleList\)"):
            command(other, "float")


def test_more_experts_are_asked_for_than_there_are(model) -> None:
    other = make("qwen3_moe")
    other.config.num_experts_per_tok = 5
    with pytest.raises(TraceError, match="has 4 experts, and 5 of them are asked for"):
        panguq.compile(other, "float")
