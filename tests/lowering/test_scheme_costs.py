"""What passes that choose schemes are told by a target."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx

import panguq
from panguq.ir.edit import find_label
from panguq.ir.quant_spec import SCHEMES, parse_scheme
from panguq.lowering.choice import DECODE_STEPS
from panguq.lowering.graph_problems import matmul_problem
from panguq.lowering.scheme_costs import TargetRules
from panguq.lowering.select_kernel import select_kernel
from panguq.lowering.targets import find_target
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import PassContext
from panguq.tensors.weight_store import WeightStore
from panguq.tracing import trace
from tests.model_shelf import shared_model, token_ids

DOWN = "model.layers.0.mlp.down_proj:linear"
NPU = "ascend910b1"


@functools.cache
def in_bfloat16() -> fx.GraphModule:
    gm, interface = trace(shared_model("llama"), None, torch.bfloat16)
    Canonicalize().run(gm, PassContext(interface, WeightStore()))
    return gm


@pytest.mark.parametrize("target", ["cpu", NPU])
def test_refusals_are_those_of_the_target(target: str) -> None:
    node = find_label(in_bfloat16(), DOWN)
    rules = TargetRules(find_target(target))
    assert rules.refusal(node, SCHEMES["W8A16"]) is None
    assert rules.refusal(node, SCHEMES["FLOAT"]) is None
    six = rules.refusal(node, parse_scheme("W6A16"))
    assert six is None if target == "cpu" else "no NPU kernel reads 6-bit weights" in str(six)


@pytest.mark.parametrize("scheme", ["FLOAT", "W8A16", "W8A8_DYNAMIC", "W4A16-g32"])
def test_times_are_those_of_the_selected_kernels(scheme: str) -> None:
    node = find_label(in_bfloat16(), DOWN)
    wanted = parse_scheme(scheme)
    cpu = find_target("cpu")
    choice = select_kernel(matmul_problem(node, wanted), cpu)
    expected = DECODE_STEPS * choice.decode_us + choice.prefill_us
    assert TargetRules(cpu).predicted_us(node, wanted) == pytest.approx(expected)
    ascend = find_target(NPU)
    best = dict(
        select_kernel(matmul_problem(node, wanted, largest_n=ascend.largest_n), ascend).storage_us
    )
    rules = TargetRules(ascend)
    first = rules.predicted_us(node, wanted)
    assert 0 < first <= min(best.values()) * (1 + 1e-9)  # NZ may be faster than ND
    assert rules.predicted_us(node, wanted) == first


def test_an_npu_chooses_among_what_it_can_run() -> None:
    choices = ["W4A16-g32", "W6A16-g32", "W8A16"]
    budget = {"choices": choices, "bits": 7.0, "relative_time": 4.0}
    recipe = {
        "schemes": {"*": "W4A16-g32"},
        "passes": [{"mixed-precision": budget}, "insert-fake-quant", "quantize-weights"],
    }
    model = panguq.compile(shared_model("llama"), recipe, calibration=token_ids(2, 12), target=NPU)
    assert {m.scheme for m in model.report.matmuls} == {"W4A16-g32", "W8A16", "FLOAT"}
