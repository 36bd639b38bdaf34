"""Each lowered matmul against its fake-quant twin, both fed the same input."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, fx

from panguq.errors import LoweringError
from panguq.ir.edit import clone, find_label, label, op_name
from panguq.ir.node_meta import annotate, scheme_of
from panguq.ir.number_format import INT8, Integer
from panguq.ir.properties import Property
from panguq.ir.quant_spec import QuantSpec, Scheme
from panguq.ir.run.interpret import run, values
from panguq.ir.verify import verify
from panguq.kernels.cpu.int8_linear import int32_matmul
from panguq.lowering.lower_matmuls import LowerMatmuls, check_lowerable
from panguq.lowering.run.prepack import prepack
from panguq.lowering.targets import find_target
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import PassContext, linears
from panguq.passes.pipeline.runner import PassRecord
from panguq.passes.quantize_weights import QuantizeWeights
from tests.model_shelf import OneLinear, run_passes, run_pipeline, tiny_context, trace_tiny

panguq = torch.ops.panguq
INTEGER = ("W8A8", "W8A8_DYNAMIC")
WEIGHT_ONLY = ("W8A16", "W4A16", "W4A16_ASYM", "W4A16-g32", "W4A16-per_channel")
SHAPES = [(1, 64), (33, 64), (64, 96), (48, 576), (7, 128), (16, 50), (5, 33)]  # n, k
QDQ_HELD = frozenset({Property.CANONICAL, Property.SCHEMES, Property.QDQ, Property.WEIGHT_CODES})


def sqnr_db(expected: Tensor, actual: Tensor) -> float:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    noise = (expected.double() - actual.double()).square().sum().item()
    signal = expected.double().square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def test_the_measure_fails_where_it_should() -> None:
    x = torch.randn(4, 5)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, 2 * x) <= 0 and sqnr_db(x, -x) < 0
    with pytest.raises(AssertionError):
        sqnr_db(x, x[:1])


@functools.cache
def fake_quant(n: int, k: int, scheme: str, bias: bool) -> tuple[fx.GraphModule, PassContext]:
    gm, interface = trace_tiny(OneLinear(k, n, bias), torch.randn(3, k))
    ctx = tiny_context(interface, inputs(k, 64))
    run_passes(gm, ctx, scheme, Calibrate(), InsertFakeQuant(), QuantizeWeights())
    return gm, ctx


def lowered(
    n: int, k: int, scheme: str, bias: bool = True, **options
) -> tuple[fx.GraphModule, fx.GraphModule, PassRecord]:
    """The fake-quant graph, the lowered one, and what the pass did."""
    before, ctx = fake_quant(n, k, scheme, bias)
    gm = clone(before)
    records, _ = run_pipeline(gm, [LowerMatmuls(**options)], ctx, held=QDQ_HELD)
    return before, gm, records[0]


def inputs(k: int, m: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(k * 1000 + m)) - 0.3


def in_calls_of(gm: fx.GraphModule, x: Tensor, m: int) -> Tensor:
    """m tokens a call, put together: one output alone may be next to nothing by cancellation."""
    return torch.cat([run(gm, {"x": part})[0] for part in x.split(m)])


def kernel(gm: fx.GraphModule) -> str:
    return op_name(find_label(gm, "fc:linear"))


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", INTEGER)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_integer_matmuls_to_100_db(n, k, m, scheme, bias) -> None:
    before, gm, _ = lowered(n, k, scheme, bias)
    x = inputs(k, 80)
    assert kernel(gm) == "int8_linear"
    assert sqnr_db(in_calls_of(before, x, m), in_calls_of(gm, x, m)) >= 100


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@pytest.mark.parametrize(("n", "k"), [s for s in SHAPES if s[1] % 32 == 0])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_weight_only_matmuls_to_45_db(n, k, m, scheme, bias) -> None:
    before, gm, _ = lowered(n, k, scheme, bias)
    x = inputs(k, 80)
    assert sqnr_db(in_calls_of(before, x, m), in_calls_of(gm, x, m)) >= 45


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", ["W8A16", "W4A16", "W4A16_ASYM", "W4A16-g32"])
def test_weight_only_matmuls_to_45_db_on_both_sides_of_few_tokens(scheme, bias) -> None:
    before, gm, record = lowered(48, 576, scheme, bias)
    table = record.result.tables["kernel_choices"]
    few = dict(zip(table.columns, table.rows[0], strict=True))["few_tokens"]
    assert few > 0
    for m in (few, few + 1):
        x = {"x": inputs(576, m)}
        assert sqnr_db(run(before, x)[0], run(gm, x)[0]) >= 45


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16", "W4A16_ASYM"])
@pytest.mark.parametrize(("n", "k"), [s for s in SHAPES if s[1] % 32 == 0])
def test_weight_only_matmuls_in_float32_to_100_db(n, k, scheme) -> None:
    before, gm, record = lowered(n, k, scheme, precision="float32")
    x = {"x": inputs(k, 9)}
    assert kernel(gm) == "dequantized_linear"
    assert sqnr_db(run(before, x)[0], run(gm, x)[0]) >= 100
    assert "the recipe asks for float32" in record.result.skipped[0].reason


@pytest.mark.parametrize("scheme", INTEGER)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_codes_and_sums_are_bit_equal(n, k, scheme) -> None:
    """What goes into the kernel are the fake-quant graph's codes; its sums are exact."""
    before, gm, _ = lowered(n, k, scheme)
    x = {"x": inputs(k, 40)}
    matmul, twin = find_label(gm, "fc:linear"), find_label(before, "fc:linear")
    codes, weight = matmul.args[0], matmul.args[3]
    fake_codes, fake_weight = twin.args[0].args[0], twin.args[1].args[0]
    found = values(gm, x, [codes, weight])
    expected = values(before, x, [fake_codes, fake_weight])
    assert found[codes].dtype == found[weight].dtype == torch.int8
    assert torch.equal(found[codes], expected[fake_codes])
    assert torch.equal(found[weight], expected[fake_weight])
    sums = int32_matmul(found[codes], found[weight])
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), found[codes].long() @ found[weight].long().t())


@pytest.mark.parametrize("scheme", [*INTEGER, "W8A16", "W4A16", "W4A16_ASYM"])
def test_prepacking_changes_no_bit(scheme) -> None:
    _, gm, _ = lowered(48, 576, scheme)
    packed = prepack(clone(gm))
    for m in (9, 1000):  # below and beyond few_tokens
        x = {"x": inputs(576, m)}
        assert torch.equal(run(gm, x)[0], run(packed, x)[0])
    left = {op_name(n) for n in packed.graph.nodes if n.op == "call_function"}
    assert not left & {"int4_kernel_weight", "int4_kernel_scales", "weight_row_sums"}


def test_prepacking_leaves_the_stored_codes_where_they_are() -> None:
    """They are mapped from a file: a copy would be a second weight in memory."""
    _, gm, _ = lowered(48, 576, "W4A16")
    stored = {t.data_ptr() for _, t in gm.named_buffers() if t.dtype == torch.uint8}
    packed = prepack(clone(gm))
    kernel_call = find_label(packed, "fc:linear")
    given = {
        name: getattr(packed, str(argument.target))
        for name, argument in zip(("layout", "codes"), kernel_call.args[1:4:2], strict=True)
    }
    assert stored == {given["codes"].data_ptr()}
    assert given["layout"].data_ptr() not in stored


@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16", "FLOAT"])
def test_lowering_stores_no_second_weight(scheme) -> None:
    before, gm, _ = lowered(48, 576, scheme)
    names = [{n for n, _ in graph.named_buffers()} for graph in (before, gm)]
    assert names[1] <= names[0]


# --- which kernel, and why not another ----------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "n", "k", "wanted"),
    [
        ("W8A8", 33, 64, "int8_linear"),
        ("W8A8_DYNAMIC", 5, 33, "int8_linear"),
        ("W8A16", 64, 96, "int8_weight_linear"),
        ("W4A16", 64, 576, "int4_linear"),
        ("W4A16_ASYM", 64, 576, "int4_linear"),
        ("FLOAT", 64, 96, "linear"),
    ],
)
def test_the_kernel_of_a_scheme(scheme, n, k, wanted) -> None:
    _, gm, record = lowered(n, k, scheme)
    assert kernel(gm) == wanted
    assert record.result.skipped == []
    assert record.result.changed == (scheme != "FLOAT")


@pytest.mark.parametrize(
    ("scheme", "n", "k", "reason"),
    [
        ("W8A16", 16, 50, "k=50 is not a multiple of 16"),
        ("W4A16", 7, 128, "n=7 is not a multiple of 16"),
        ("W4A16-per_channel", 16, 96, "group size 96 is none of"),
    ],
)
def test_a_fallback_says_why(scheme, n, k, reason) -> None:
    _, gm, record = lowered(n, k, scheme)
    assert kernel(gm) == "dequantized_linear"
    assert reason in record.result.skipped[0].reason
    table = record.result.tables["kernel_choices"]
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["matmul"], row["kernel"]) == ("fc:linear", "dequantized_linear")
    assert reason in row["others"]


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4"])
def test_4_bit_weights_with_integer_activations_are_dequantized_on_a_cpu(scheme) -> None:
    before, gm, record = lowered(48, 512, scheme, precision="float32")
    x = {"x": inputs(512, 9)}
    assert kernel(gm) == "dequantized_linear"
    assert "no integer kernel" in record.result.skipped[0].reason
    assert sqnr_db(run(before, x)[0], run(gm, x)[0]) >= 100


def test_lowered_graphs_keep_labels_schemes_and_properties() -> None:
    before, gm, _ = lowered(64, 96, "W8A8")
    assert scheme_of(find_label(gm, "fc:linear")).name == "W8A8"
    assert label(find_label(before, "fc:linear")) == "fc:linear"
    verify(gm, {Property.LOWERED, Property.CANONICAL, Property.WEIGHT_CODES}, after="it")


def test_two_bit_weights_with_quantized_inputs_run_dequantized() -> None:
    gm, _ = trace_tiny(OneLinear(64, 8), torch.randn(3, 64))
    int2 = QuantSpec(Integer(2), "per_group", group_size=32)
    token = QuantSpec(INT8, "per_token", dynamic=True)
    annotate(linears(gm)[0], scheme=Scheme("W2A8", int2, token))
    check_lowerable(gm, find_target("cpu"), "bfloat16")


def test_grouped_int8_weights_with_int8_activations_are_refused() -> None:
    gm, _ = trace_tiny(OneLinear(64, 8), torch.randn(3, 64))
    grouped = QuantSpec(INT8, "per_group", group_size=32)
    annotate(linears(gm)[0], scheme=Scheme("W8A8-g32", grouped, QuantSpec(INT8, "per_token")))
    with pytest.raises(LoweringError, match="weights must be per channel"):
        check_lowerable(gm, find_target("cpu"), "bfloat16")


def test_an_unknown_target() -> None:
    with pytest.raises(LoweringError, match="unknown target 'cpuu'") as caught:
        lowered(64, 96, "W8A8", target="cpuu")
    assert caught.value.hint.startswith("did you mean cpu? The targets are cpu, ascend910b1")
