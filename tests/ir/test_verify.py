"""Every check of every property, made to fire on a graph broken on purpose."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import VerifyError
from panguq.ir.edit import call, clone, fake_of, find_label, replace, set_tensor
from panguq.ir.interface import Interface
from panguq.ir.node_meta import annotate
from panguq.ir.properties import Property
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.verify import CHECKS, check_form, verify
from panguq.lowering.ascend.fuse_ascend import FuseAscend
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import Pass, PassContext, PassResult
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import run_passes, run_pipeline, tiny_context, trace_tiny

aten = torch.ops.aten
panguq = torch.ops.panguq
A, B = "a:linear", "b:linear"
INTERFACE = Interface(kind="module", inputs=(), outputs=(), input_shapes={}, float_dtype="float32")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


STAGES: dict[str, tuple[Pass, ...]] = {
    "schemes": (),
    "calibrated": (Calibrate(),),
    "fake-quant": (Calibrate(), InsertFakeQuant()),
    "codes": (Calibrate(), InsertFakeQuant(), QuantizeWeights()),
    "lowered": (Calibrate(), InsertFakeQuant(), QuantizeWeights(), LowerMatmuls()),
    "npu": (
        Calibrate(), InsertFakeQuant(), QuantizeWeights(), LowerMatmuls("ascend910b1"), FuseAscend()
    ),
}  # fmt: skip


@functools.cache
def _stage(name: str, scheme: str) -> fx.GraphModule:
    dtype = torch.bfloat16 if name == "npu" else torch.float32
    gm, interface = trace_tiny(Two().to(dtype), torch.randn(3, 8).to(dtype))
    run_passes(gm, tiny_context(interface, torch.randn(16, 8).to(dtype)), scheme, *STAGES[name])
    return gm


def stage(name: str, scheme: str = "W8A8") -> fx.GraphModule:
    return clone(_stage(name, scheme))


Break = Callable[[fx.GraphModule], None]


def forget(key: str, where: str = A) -> Break:
    return lambda gm: annotate(find_label(gm, where), **{key: None})


def forget_type(gm: fx.GraphModule) -> None:
    del find_label(gm, A).meta["val"]


def relabel(gm: fx.GraphModule) -> None:
    annotate(find_label(gm, B), label=A)


def call_unknown(gm: fx.GraphModule) -> None:
    find_label(gm, "relu").target = aten.bernoulli.default


def call_in_place(gm: fx.GraphModule) -> None:
    find_label(gm, "relu").target = aten.relu_.default


def float_weight(gm: fx.GraphModule) -> None:
    """The matmul reads the original weight past its codes."""
    node = find_label(gm, A)
    with gm.graph.inserting_before(node):
        weight = gm.graph.get_attr("a.weight")
    set_tensor(gm, "a.weight", torch.zeros(8, 8))
    weight.meta["val"] = fake_of(gm, torch.zeros(8, 8))
    node.update_arg(1, weight)


def float_input(gm: fx.GraphModule) -> None:
    find_label(gm, A).update_arg(0, find_label(gm, "x"))


def quantized_input(gm: fx.GraphModule) -> None:
    """A weight-only matmul whose input is dequantized all the same."""
    annotate(find_label(gm, A), scheme=SCHEMES["W8A16"])


def quantize_already(gm: fx.GraphModule) -> None:
    node = find_label(gm, A)
    codes = call(node, panguq.quantize_weight.default,
                 (node.args[1], node.args[1], None, 8, -128, 127), origin=node)  # fmt: skip
    call(node, panguq.dequantize_weight.default, (codes, node.args[1], None, 8, torch.float32),
         origin=node)  # fmt: skip


def cache_codes(gm: fx.GraphModule) -> None:
    given = find_label(gm, "x")
    given.target = "past_key_0"
    annotate(given, label="past_key_0")
    given.meta["val"] = given.meta["val"].to(torch.int8)


def choose_codes(gm: fx.GraphModule) -> None:
    QuantizeWeights().run(gm, PassContext(INTERFACE, WeightStore()))


def dequantize_again(gm: fx.GraphModule) -> None:
    """After lowering, a linear that reads codes through a dequantize."""
    last = gm.graph.output_node()
    codes = next(n for n in gm.graph.nodes if str(n.target).endswith("a.weight_codes"))
    scale = next(n for n in gm.graph.nodes if str(n.target).endswith("a.weight_scale"))
    weight = call(last, panguq.dequantize_weight.default, (codes, scale, None, 8, torch.float32),
                  origin=find_label(gm, A), suffix=".again")  # fmt: skip
    call(last, aten.linear.default, (find_label(gm, "x"), weight), origin=find_label(gm, A),
         suffix=".linear")  # fmt: skip


def call_canonical(gm: fx.GraphModule) -> None:
    node = find_label(gm, "relu")
    gate = node.args[0]
    replace(node, call(node, torch.ops.panguq.swiglu.default, (gate, gate), origin=node))


CASES: list[tuple[Property, str, Break, str]] = [
    (Property.CANONICAL, "schemes", forget("label"), "missing or not unique"),
    (Property.CANONICAL, "schemes", relabel, "the label of a:linear is missing or not unique"),
    (Property.CANONICAL, "schemes", call_unknown, "relu calls aten.bernoulli.default"),
    (Property.CANONICAL, "schemes", call_in_place, "relu calls aten.relu_.default"),
    (Property.FLOAT_MATMULS, "schemes", quantize_already, "stands for a weight that is quantized"),
    (Property.FLOAT_CACHE, "schemes", cache_codes, "past_key_0 holds codes"),
    (Property.UNSOLVED, "fake-quant", choose_codes, "the codes of a:linear.weight.* are chosen"),
    (Property.SCHEMES, "schemes", forget("scheme"), "a:linear has no scheme"),
    (Property.STATISTICS, "calibrated", forget("input_statistics"), "no statistics of its input"),
    (Property.CALIBRATED, "calibrated", forget("input_range", B), "b:linear .* no observed range"),
    (Property.QDQ, "fake-quant", float_weight, "weight of a:linear is not dequantized"),
    (Property.QDQ, "fake-quant", float_input, "a:linear is W8A8 and its input"),
    (Property.QDQ, "fake-quant", quantized_input, "a:linear is W8A16 and its input"),
    (Property.LOWERED, "lowered", dequantize_again, "a:linear.linear still reads"),
    (Property.ASCEND_OPS, "npu", call_canonical, "calls panguq::swiglu, which an Ascend NPU"),
]


@pytest.mark.parametrize(("held", "name", "break_it", "complaint"), CASES)
def test_a_broken_property_is_named(held, name, break_it, complaint) -> None:
    gm = stage(name)
    verify(gm, {held}, after="nothing")  # whole before, broken after
    break_it(gm)
    with pytest.raises(VerifyError, match=complaint) as caught:
        verify(gm, {held}, after="pass 07 break-it")
    assert caught.value.message.startswith("after pass 07 break-it the graph is wrong: ")
    assert held.name in caught.value.message


@pytest.mark.parametrize(("later", "earlier"), [("codes", "fake-quant"), ("lowered", "codes")])
def test_a_pass_that_was_left_out_is_noticed(later, earlier) -> None:
    """The graph of the stage before does not have the property of the stage after."""
    held = {"codes": Property.WEIGHT_CODES, "lowered": Property.LOWERED}[later]
    verify(stage(later), {held}, after="it")
    with pytest.raises(VerifyError, match=f"{held.name}: .* still"):
        verify(stage(earlier), {held}, after="it")


def test_every_property_has_one_check_and_a_case_here() -> None:
    assert set(CHECKS) == set(Property)
    assert {held for held, *_ in CASES} | {Property.WEIGHT_CODES} == set(Property)


@pytest.mark.parametrize("scheme", ["FLOAT", "W8A16", "W8A8_DYNAMIC", "W4A16", "W4A16_ASYM"])
def test_every_scheme_goes_through_whole(scheme) -> None:
    """What a scheme does not need, no check asks for."""
    others = {Property.LOWERED, Property.ASCEND_OPS, Property.FLOAT_MATMULS, Property.UNSOLVED}
    verify(stage("codes", scheme), set(Property) - others, after="it")
    verify(stage("lowered", scheme), {Property.LOWERED, Property.CANONICAL}, after="it")


# --- the form of any graph ----------------------------------------------------------------------


def wrong_shape(gm: fx.GraphModule) -> None:
    set_tensor(gm, "a.weight", torch.zeros(8, 9))


def wrong_dtype(gm: fx.GraphModule) -> None:
    set_tensor(gm, "a.weight", torch.zeros(8, 8).half())


def call_a_module(gm: fx.GraphModule) -> None:
    gm.add_module("extra", nn.ReLU())
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_module("extra", (find_label(gm, B),))


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (forget_type, "a:linear has no value type"),
        (wrong_shape, r"weight a\.weight is torch\.float32\[8, 9\] but its node says"),
        (wrong_dtype, r"weight a\.weight is torch\.float16\[8, 8\]"),
        (call_a_module, "only op calls"),
    ],
)
def test_a_broken_form_is_named(break_it, complaint) -> None:
    gm = stage("schemes")
    assert check_form(gm) is None
    break_it(gm)
    with pytest.raises(VerifyError, match=complaint):
        verify(gm, (), after="it")


# --- through the runner -------------------------------------------------------------------------


class DropSchemes(Pass):
    name = "drop-schemes"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        for node in gm.graph.nodes:
            annotate(node, scheme=None)
        return PassResult(changed=1)


class DropSchemesHonestly(DropSchemes):
    name = "drop-schemes-honestly"
    breaks = frozenset({Property.SCHEMES})


def test_the_runner_verifies_after_every_pass_and_names_it() -> None:
    gm, interface = trace_tiny(Two(), torch.randn(3, 8))
    ctx = tiny_context(interface, torch.randn(16, 8))
    with pytest.raises(VerifyError, match="after pass 03 drop-schemes the graph is wrong: SCHEMES"):
        run_passes(gm, ctx, "W8A8", DropSchemes())


def test_a_pass_may_break_what_it_says_it_breaks() -> None:
    gm, interface = trace_tiny(Two(), torch.randn(3, 8))
    records = run_passes(gm, tiny_context(interface), "W8A8", DropSchemesHonestly())
    assert records[-1].folder == "03_drop-schemes-honestly"
    _, held = run_pipeline(gm, [], tiny_context(interface), held=frozenset({Property.CANONICAL}))
    assert held == {Property.CANONICAL}
