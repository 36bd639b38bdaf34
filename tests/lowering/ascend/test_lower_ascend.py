"""Each matmul lowered to NPU ops against its fake-quant twin, both fed the same input."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import LoweringError
from panguq.ir.edit import clone, find_label, label, op_name
from panguq.ir.node_meta import scheme_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.run.interpret import run, values
from panguq.ir.verify import verify
from panguq.ir.views import Linear
from panguq.kernels.ascend.vendor.contracts import violations
from panguq.kernels.ascend.vendor.operators import OPERATORS_910B
from panguq.kernels.cpu.int8_linear import int32_matmul
from panguq.lowering.ascend import dispatch
from panguq.lowering.ascend.calls import AscendCalls
from panguq.lowering.ascend.candidates import ascend_candidates
from panguq.lowering.ascend.inputs import AscendInputs
from panguq.lowering.fit_schemes import FitSchemes
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.run.prepack import prepack
from panguq.lowering.run.specialize import specialize
from panguq.lowering.targets import find_target
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import PassContext, linears
from panguq.passes.quantize_weights import QuantizeWeights
from tests.model_shelf import (
    OneLinear,
    SideBySide,
    run_passes,
    run_pipeline,
    tiny_context,
    trace_tiny,
)

aten = torch.ops.aten
npu = torch.ops.npu
panguq = torch.ops.panguq
DTYPES = [torch.bfloat16, torch.float16]
HELD = frozenset({Property.CANONICAL, Property.SCHEMES, Property.QDQ, Property.WEIGHT_CODES})
CASES = [
    (scheme, n, k)
    for scheme in (
        "W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16", "W4A16_ASYM", "W4A16-g32", "W4A8",
        "W4A8-per_channel", "W4A4",
    )
    for n, k in ((64, 256), (24, 512))
]  # fmt: skip


def sqnr_db(expected: Tensor, actual: Tensor) -> float:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    noise = (expected.double() - actual.double()).square().sum().item()
    signal = expected.double().square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def inputs(k: int, dtype: torch.dtype, *sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return (torch.randn(*sizes, k, generator=generator) - 0.3).to(dtype)


@functools.cache
def fake_quant(
    n: int, k: int, scheme: str, bias: bool, dtype: torch.dtype
) -> tuple[fx.GraphModule, PassContext]:
    gm, interface = trace_tiny(OneLinear(k, n, bias).to(dtype), inputs(k, dtype, 2, 3))
    ctx = tiny_context(interface, inputs(k, dtype, 4, 16))
    run_passes(gm, ctx, scheme, Calibrate(), InsertFakeQuant(), QuantizeWeights())
    return gm, ctx


def lowered(
    n: int,
    k: int,
    scheme: str,
    bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **options,
):
    """The fake-quant graph and the lowered one."""
    before, ctx = fake_quant(n, k, scheme, bias, dtype)
    gm = clone(before)
    run_pipeline(gm, [LowerMatmuls("ascend910b1", ascend=AscendOptions(**options))], ctx, held=HELD)
    return before, gm


def find_op(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "call_function" and op_name(n) == name)


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scheme", "n", "k"), CASES)
def test_outputs_agree_to_45_db(scheme, n, k, bias, dtype) -> None:
    before, gm = lowered(n, k, scheme, bias, dtype)
    x = {"x": inputs(k, dtype, 4, 10)}
    assert sqnr_db(run(before, x)[0], run(gm, x)[0]) >= 45


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_codes_and_int32_sums_are_equal(scheme, dtype) -> None:
    before, gm = lowered(24, 512, scheme, True, dtype)
    x = {"x": inputs(512, dtype, 4, 10)}
    quantize = find_op(gm, "npu_quantize" if scheme == "W8A8" else "npu_dynamic_quant")
    twin = find_label(before, "fc:linear")
    fake_codes, fake_weight = twin.args[0].args[0], twin.args[1].args[0]
    expected = values(before, x, [fake_codes, fake_weight])
    matmul = find_label(gm, "fc:linear.kernel")
    found = values(gm, x, [quantize, *matmul.args[:2]])
    codes = found[quantize] if scheme == "W8A8" else found[quantize][0]
    assert torch.equal(codes, expected[fake_codes])
    sums = int32_matmul(found[matmul.args[0]], found[matmul.args[1]].t().contiguous())
    flat = expected[fake_codes].flatten(0, -2).long()
    assert torch.equal(sums.long(), flat @ expected[fake_weight].long().t())


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8", "W4A4"])
def test_int4_codes_are_those_of_the_twin(scheme) -> None:
    before, gm = lowered(24, 512, scheme)
    x = {"x": inputs(512, torch.bfloat16, 2, 5)}
    fake_weight = find_label(before, "fc:linear").args[1].args[0]
    weight = find_label(gm, "fc:linear.kernel").args[1]
    expected = values(before, x, [fake_weight])[fake_weight]
    packed = values(gm, x, [weight])[weight]
    assert packed.dtype == torch.int32 and packed.shape == (512, 3)
    assert torch.equal(panguq.unpack_int4(packed.view(torch.uint8)), expected.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scheme", "n", "k"), CASES)
def test_every_call_keeps_the_contract_of_its_op(scheme, n, k, dtype) -> None:
    _, gm = lowered(n, k, scheme, True, dtype)
    for m in (1, 4096):
        calls = [c for c in specialize(gm, m).graph.nodes if str(c.target).startswith("npu.")]
        for node in calls:
            args, named = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
            assert violations(node.target, args, named) == []


def test_a_call_that_breaks_a_contract_is_refused_where_it_is_made(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "dtype_number", lambda dtype: 3)  # int32
    vendor = Candidate("npu_quant_matmul")
    before, ctx = fake_quant(64, 256, "W8A8_DYNAMIC", True, torch.bfloat16)
    node = find_label(clone(before), "fc:linear")
    gm = node.graph.owning_module
    calls = AscendCalls(gm, AscendInputs(gm, ctx.store))
    with pytest.raises(LoweringError, match=r"an Ascend NPU cannot run npu\.npu_quant"):
        calls.lower(node, [(1, vendor)], slice(None))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W4A16", "W4A8"])
def test_prepacking_changes_no_bit_and_leaves_no_layout_op(scheme) -> None:
    _, gm = lowered(64, 256, scheme)
    packed = prepack(clone(gm))
    x = {"x": inputs(256, torch.bfloat16, 2, 5)}
    assert torch.equal(run(gm, x)[0], run(packed, x)[0])
    left = {op_name(n) for n in packed.graph.nodes if n.op == "call_function"}
    assert not left & {"int4_weight", "t", "clone", "slice", "npu_format_cast"}


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_the_weight_format_changes_no_bit(scheme) -> None:
    x = {"x": inputs(256, torch.bfloat16, 2, 5)}
    graphs = {f: lowered(64, 256, scheme, weight_format=f)[1] for f in ("ND", "NZ", "auto")}
    results = [run(gm, x)[0] for gm in graphs.values()]
    assert all(torch.equal(r, results[0]) for r in results)
    casts = {
        f: [n for n in gm.graph.nodes if op_name(n) == "npu_format_cast"]
        for f, gm in graphs.items()
    }
    assert casts["ND"] == [] and len(casts["NZ"]) == 1
    kernel = find_label(graphs["NZ"], "fc:linear.kernel")
    assert op_name(kernel) == "npu_quant_matmul"  # panguq's own kernels read ND


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_a_recipe_may_want_the_vendors_kernels_alone(scheme) -> None:
    free = MatmulProblem(None, 4096, 4096, SCHEMES[scheme])
    for problem, allowed in ((free, True), (replace(free, own_kernels=False), False)):
        found = ascend_candidates(problem, find_target("ascend910b1"))
        own = {c.refusal for c in found if c.schedule != "vendor"}
        assert (None in own) == allowed
    gm = lowered(64, 256, scheme, own_kernels=False)[1]
    assert op_name(find_label(gm, "fc:linear.kernel")).startswith("npu_")


def test_a_compile_asks_which_format_an_operator_takes(monkeypatch) -> None:
    listed = OPERATORS_910B["npu_quant_matmul"]
    plain = replace(listed, rows=tuple(row for row in listed.rows if "NZ" not in row))
    monkeypatch.setitem(OPERATORS_910B, "npu_quant_matmul", plain)
    lowered(64, 256, "W8A8", weight_format="ND")
    with pytest.raises(LoweringError, match=r"fc:linear: .* takes no x1 int8, x2 int8 in NZ"):
        lowered(64, 256, "W8A8", weight_format="NZ")


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16", "W4A8"])
def test_other_weights_stay_nd(scheme) -> None:
    _, gm = lowered(64, 256, scheme, weight_format="NZ")
    assert not [n for n in gm.graph.nodes if op_name(n) == "npu_format_cast"]


# --- which call ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "dtype", "scale"),
    [
        ("W8A8", torch.bfloat16, torch.float32),
        ("W8A8", torch.float16, torch.int64),
        ("W8A8_DYNAMIC", torch.float16, torch.float32),
        ("W4A8", torch.bfloat16, torch.int64),
        ("W8A16", torch.bfloat16, torch.bfloat16),
        ("W4A16", torch.float16, torch.float16),
    ],
)
def test_the_dtype_of_a_scale(scheme, dtype, scale) -> None:
    _, gm = lowered(64, 256, scheme, True, dtype)
    assert find_label(gm, "fc:linear.kernel").args[2].meta["val"].dtype == scale


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
)
def test_the_bias_of_a_weight_only_matmul(dtype, wanted) -> None:
    _, gm = lowered(64, 256, "W8A16", True, dtype)
    kernel = find_label(gm, "fc:linear.kernel")
    biases = [n for n in kernel.all_input_nodes if "bias" in str(n.target)]
    assert [n.meta["val"].dtype for n in biases] == [wanted]


def test_a_bias_too_large_for_int32_is_added_afterwards() -> None:
    model = OneLinear(64, 16).bfloat16()
    with torch.no_grad():
        model.fc.bias.fill_(1e9)
        model.fc.weight.mul_(1e-3)
    gm, interface = trace_tiny(model, inputs(64, torch.bfloat16, 2, 3))
    ctx = tiny_context(interface, inputs(64, torch.bfloat16, 4, 16))
    run_passes(gm, ctx, "W8A8", Calibrate(), InsertFakeQuant(), QuantizeWeights())
    run_pipeline(gm, [LowerMatmuls("ascend910b1")], ctx, held=HELD)
    assert find_op(gm, "add").args[1].meta["val"].dtype == torch.bfloat16
    result = run(gm, {"x": inputs(64, torch.bfloat16, 2, 3)})[0]
    assert torch.equal(result, torch.full_like(result, 1e9))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_matmuls_that_read_one_tensor_quantize_it_once(scheme) -> None:
    gm, interface = trace_tiny(SideBySide(64, 32, 16).bfloat16(), inputs(64, torch.bfloat16, 2, 3))
    ctx = tiny_context(interface, inputs(64, torch.bfloat16, 4, 16))
    run_passes(gm, ctx, scheme, Calibrate(), InsertFakeQuant(), QuantizeWeights())
    run_pipeline(gm, [LowerMatmuls("ascend910b1")], ctx, held=HELD)
    quantizers = [n for n in gm.graph.nodes if op_name(n) in ("npu_quantize", "npu_dynamic_quant")]
    assert len([n for n in quantizers if n.op == "call_function"]) == 1


def test_more_than_65535_outputs_become_several_calls() -> None:
    before, gm = lowered(70000, 32, "W8A16", False)
    calls = [n for n in gm.graph.nodes if n.target is npu.npu_weight_quant_batchmatmul.default]
    assert len(calls) == 2
    x = {"x": inputs(32, torch.bfloat16, 2, 3)}
    assert sqnr_db(run(before, x)[0], run(gm, x)[0]) >= 45


# --- fallbacks ----------------------------------------------------------------------------------


def fitted(model: nn.Module, k: int, scheme: str):
    gm, interface = trace_tiny(model.bfloat16(), inputs(k, torch.bfloat16, 2, 3))
    run_passes(gm, tiny_context(interface, inputs(k, torch.bfloat16, 2, 3)), scheme)
    result = FitSchemes("ascend910b1").run(
        gm, tiny_context(interface, inputs(k, torch.bfloat16, 2, 3))
    )
    return gm, result


def test_a_matmul_that_does_not_fit_falls_back_and_says_why() -> None:
    gm, result = fitted(OneLinear(320, 64), 320, "W4A8")
    assert scheme_of(linears(gm)[0]).name == "W8A8_DYNAMIC"
    assert result.skipped[0].node == "fc:linear"
    assert "W4A8 -> W8A8_DYNAMIC" in result.skipped[0].reason
    assert "256" in result.skipped[0].reason


def test_siblings_fall_back_together() -> None:
    two = SideBySide(256, 32, 12)  # 4-bit weights take outputs in eights
    gm, result = fitted(two, 256, "W4A16")
    assert {scheme_of(n).name for n in linears(gm)} == {"W8A16"}
    assert len(result.skipped) == 2
    assert all("two:linear (n=12, k=256)" in skip.reason for skip in result.skipped)


def test_what_fits_is_left_alone() -> None:
    gm, result = fitted(OneLinear(256, 64), 256, "W4A8")
    assert result.changed == 0 and result.skipped == []
    assert scheme_of(linears(gm)[0]).name == "W4A8"


def test_lowered_graphs_keep_labels_and_properties() -> None:
    before, gm = lowered(64, 256, "W8A8")
    assert scheme_of(find_label(gm, "fc:linear")).name == "W8A8"
    assert label(find_label(before, "fc:linear")) == "fc:linear"
    assert Linear.of(find_label(before, "fc:linear")).source.target == "x"
    assert operator.getitem not in {n.target for n in gm.graph.nodes}
    verify(gm, {Property.LOWERED, Property.CANONICAL, Property.WEIGHT_CODES}, after="it")
