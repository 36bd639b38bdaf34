"""QDQ pairs stand where the schemes want them, once for what is shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from panguq.errors import NumericsError
from panguq.ir.edit import find_label, get_tensor, set_tensor
from panguq.ir.node_meta import annotate, range_of
from panguq.ir.number_format import INT8
from panguq.ir.ops.quantize import dequantize, quantize_per_tensor
from panguq.ir.quant_spec import SCHEMES, QuantSpec
from panguq.ir.run.interpret import run, values
from panguq.ir.text.printer import print_graph
from panguq.passes.calibrate import Calibrate
from panguq.passes.codes.static_scales import affine, storable_scale
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import linears
from panguq.passes.quantize_weights import QuantizeWeights
from tests.model_shelf import run_passes, tiny_context, trace_tiny

panguq = torch.ops.panguq


class Siblings(nn.Module):
    """Two linears that read one tensor, and one that reads their sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)
        self.down = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.gate(x) + self.up(x)).relu())


def quantized(module: nn.Module, scheme: str, *more, k: int = 64) -> tuple[fx.GraphModule, Tensor]:
    x = torch.randn(32, k, generator=torch.Generator().manual_seed(1))
    gm, interface = trace_tiny(module, torch.randn(3, k))
    run_passes(gm, tiny_context(interface, x), scheme, Calibrate(), InsertFakeQuant(), *more)
    return gm, x


def count(gm: fx.GraphModule, op) -> int:
    return sum(n.target is op.default for n in gm.graph.nodes)


GOLDEN = ("W8A8", "W8A8_DYNAMIC", "W8A8_FP8", "W8A16", "W4A16", "W4A16_ASYM")


@pytest.mark.parametrize("scheme", GOLDEN)
def test_golden(golden, scheme) -> None:
    gm, _ = quantized(Siblings(), scheme)
    golden(f"insert_fake_quant_{scheme.lower()}", print_graph(gm))


def test_siblings_share_one_quantize_node() -> None:
    gm, _ = quantized(Siblings(), "W8A8")
    gate, up, down = linears_of(gm)
    assert gate.args[0] is up.args[0] is not down.args[0]
    assert count(gm, panguq.quantize_per_tensor) == 2
    dynamic, _ = quantized(Siblings(), "W8A8_DYNAMIC")
    assert count(dynamic, panguq.quantize_per_token) == 2


def linears_of(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default]


class Tied(nn.Module):
    """One weight, read by two linears with inputs of different size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(self.norm(x), self.weight)
        return functional.linear(100 * x.relu(), self.weight)


def test_a_shared_weight_is_quantized_once() -> None:
    gm, _ = quantized(Tied(), "W8A16", QuantizeWeights(), k=32)
    first, second = linears_of(gm)
    assert first.args[1] is second.args[1]
    assert sum("codes" in str(n.target) for n in gm.graph.nodes if n.op == "get_attr") == 1


def test_two_matmuls_of_one_module_keep_their_own_ranges() -> None:
    """Both are called after the same module; their inputs differ a hundredfold."""
    gm, x = quantized(Tied(), "W8A8", k=32)
    scales = [
        get_tensor(gm, str(n.args[1].target)).item()
        for n in gm.graph.nodes
        if n.target is panguq.quantize_per_tensor.default
    ]
    expected = [affine(*range_of(node), SCHEMES["W8A8"].activation)[0] for node in linears_of(gm)]
    assert scales == pytest.approx(expected)
    assert scales[1] > 30 * scales[0]
    plain, interface = trace_tiny(Tied(), torch.randn(3, 32))
    name = interface.inputs[0]
    wanted, got = run(plain, {name: x})[0], run(gm, {name: x})[0]
    assert (wanted - got).norm() < 0.05 * wanted.norm()


def test_weights_and_inputs_are_on_their_grids() -> None:
    gm, x = quantized(Siblings(), "W8A8")
    node = find_label(gm, "gate:linear")
    scale, zero = affine(float(x.min()), float(x.max()), SCHEMES["W8A8"].activation)
    given_by = values(gm, {"x": x}, [node.args[0], node.args[1]])
    codes = (x.double() / scale).round() + zero
    expected = ((codes.clamp(-128, 127) - zero) * scale).float()
    torch.testing.assert_close(given_by[node.args[0]], expected, rtol=0, atol=scale * 1.01)
    assert ((given_by[node.args[0]] - expected).abs() < 1e-5).double().mean() > 0.999
    weight = Siblings().gate.weight.detach()
    steps = weight.abs().amax(1, keepdim=True) / 127
    grid = (weight / steps).round() * steps
    torch.testing.assert_close(given_by[node.args[1]], grid, rtol=1e-6, atol=1e-7)


def test_per_token_scales_follow_each_token() -> None:
    gm, x = quantized(Siblings(), "W8A8_DYNAMIC")
    node = find_label(gm, "gate:linear")
    x = x * torch.logspace(-3, 3, 32)[:, None]
    value = values(gm, {"x": x}, [node.args[0]])[node.args[0]]
    steps = x.abs().amax(1, keepdim=True) / 127
    assert ((value - x).abs() <= 0.5001 * steps).all()


def test_float_schemes_are_left_alone() -> None:
    gm, _ = quantized(Siblings(), "FLOAT")
    plain, _ = trace_tiny(Siblings(), torch.randn(3, 64))
    assert print_graph(gm).replace("  # FLOAT", "") == print_graph(plain)


def test_a_weight_that_is_not_finite_is_named() -> None:
    gm, interface = trace_tiny(Siblings(), torch.randn(3, 64))
    set_tensor(gm, "up.weight", torch.full((32, 64), float("nan")))
    ctx = tiny_context(interface, torch.randn(8, 64))
    with pytest.raises(NumericsError, match=r"weight up\.weight \[32, 64\]"):
        InsertFakeQuant().run(assigned(gm, ctx, "W8A16"), ctx)


def assigned(gm: fx.GraphModule, ctx, scheme: str) -> fx.GraphModule:
    for node in linears(gm):
        annotate(node, scheme=SCHEMES[scheme])
    return gm


# --- scale and zero point -----------------------------------------------------------------------

SPECS = (SCHEMES["W8A8"].activation, QuantSpec(INT8, "per_tensor"))


@given(
    bounds=st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)),
    spec=st.sampled_from(SPECS),
)
def test_every_value_of_the_range_is_within_half_a_step(bounds, spec) -> None:
    low, high = sorted(bounds)
    scale, zero = affine(low, high, spec)
    assert scale > 0 and spec.quant_min <= zero <= spec.quant_max
    assert spec.symmetric <= (zero == 0)
    x = torch.linspace(low, high, 301)
    step, offset = torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32)
    codes = quantize_per_tensor(x, step, offset, spec.quant_min, spec.quant_max)
    values = dequantize(codes, step, offset, torch.float32)
    # The zero point is rounded: the ends may lie half a step beyond the last code.
    assert ((values - x).abs() <= scale * (0.5 if spec.symmetric else 1.0) * 1.001 + 1e-6).all()
    assert dequantize(offset.to(torch.int8), step, offset, torch.float32).item() == 0.0


def test_an_empty_range_is_no_division_by_zero() -> None:
    for spec in SPECS:
        scale, zero = affine(0.0, 0.0, spec)
        assert scale > 0 and spec.quant_min <= zero <= spec.quant_max


@given(st.floats(1e-4, 1e3), st.sampled_from([torch.bfloat16, torch.float16]))
def test_a_16_bit_model_stores_its_scale_and_its_reciprocal(scale, dtype) -> None:
    chosen = storable_scale(scale, dtype)
    assert torch.tensor(chosen, dtype=dtype).item() == chosen
    nearest = torch.tensor(scale, dtype=dtype).item()
    assert chosen >= nearest
    gain = chosen * torch.tensor(chosen).reciprocal().to(dtype).item()
    assert abs(gain - 1) <= abs(nearest * torch.tensor(nearest).reciprocal().to(dtype).item() - 1)


def test_a_float32_model_keeps_its_scale() -> None:
    assert storable_scale(0.1, torch.float32) == 0.1


def test_a_tiny_scale_in_float16_has_a_finite_reciprocal() -> None:
    chosen = storable_scale(1e-7, torch.float16)
    assert torch.tensor(chosen).reciprocal().half().isfinite()
