"""Views read what the ops' positions hold, in float, fake-quant and lowered graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx, nn

from panguq.ir.call_arguments import arguments, operand, operands_at, optional_operand
from panguq.ir.edit import find_label, label
from panguq.ir.number_format import FLOAT8_E4M3, INT4, INT8, Integer, NumberFormat
from panguq.ir.views import (
    BinaryWeight,
    DequantizedWeight,
    Item,
    Linear,
    QuantizedInput,
    QuantizedWeight,
    by_input,
    matmul_of,
    results_of,
)
from panguq.passes.billm import BiLlm
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import Pass, linears
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.slim_llm import SlimLlm
from tests.model_shelf import run_passes, tiny_context, trace_tiny

FAKE = (Calibrate(), InsertFakeQuant())

ROOT = Path(__file__).parents[2]


class Pair(nn.Module):
    """Two linears of one value, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 6), nn.Linear(32, 8, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.relu()
        return self.a(y), torch.cat([self.b(y), y], -1)


def quantized(scheme: str, *passes: Pass) -> fx.GraphModule:
    gm, interface = trace_tiny(Pair(), torch.randn(3, 32))
    run_passes(gm, tiny_context(interface, torch.randn(40, 32)), scheme, *passes)
    return gm


def linear(gm: fx.GraphModule, name: str = "a:linear") -> Linear:
    return Linear.of(find_label(gm, name))


def test_a_stored_linear() -> None:
    gm, _ = trace_tiny(Pair(), torch.randn(3, 32))
    a, b = linear(gm), linear(gm, "b:linear")
    assert a.input is b.input is a.source and a.input.name == "relu"
    assert a.weight_name == "a.weight" and a.is_stored and a.shape == (6, 32)
    assert a.bias is not None and a.bias.target == "a.bias" and b.bias is None
    assert by_input(linears(gm)) == {a.input: [a.node, b.node]}
    assert [label(node) for node in results_of(gm)] == ["a:linear", "cat"]
    assert matmul_of(a.weight) is a.node


def test_rewired() -> None:
    gm, _ = trace_tiny(Pair(), torch.randn(3, 32))
    a, b = linear(gm), linear(gm, "b:linear")
    x = operand(a.input, 0)
    a.read_input(x)
    a.read_weight(b.weight)
    assert a.input is x and a.shape == (8, 32) and a.weight is b.weight
    assert list(x.users) == [b.input, a.node]


@pytest.mark.parametrize(
    ("scheme", "quantizer", "static"),
    [
        ("W8A8", "quantize_per_tensor", True),
        ("W8A8_DYNAMIC", "quantize_per_token", False),
        ("W8A8_FP8", "encode_per_token", False),
    ],
)
def test_a_quantized_input(scheme: str, quantizer: str, static: bool) -> None:
    gm = quantized(scheme, *FAKE)
    a = linear(gm)
    x = QuantizedInput.of(a.input)
    assert x.is_static == static and x.dtype == torch.float32
    assert (x.zero_point is not None) == static and (x.scale.op == "get_attr") == static
    assert x.source.name == "relu" and a.source is x.source
    assert x.quantizer.target is getattr(torch.ops.panguq, quantizer).default
    assert (Item.match(x.codes) is None) == static


@pytest.mark.parametrize(
    ("scheme", "passes", "format", "stored"),
    [
        ("W8A16", (), INT8, torch.float32),
        ("W8A16", (QuantizeWeights(),), INT8, torch.int8),
        ("W8A8_FP8", (), FLOAT8_E4M3, torch.float32),
        ("W8A8_FP8", (QuantizeWeights(),), FLOAT8_E4M3, torch.float8_e4m3fn),
        ("W4A16-g32", (), INT4, torch.float32),
        ("W4A16-g32", (QuantizeWeights(),), INT4, torch.uint8),
        ("W3A16-g32", (QuantizeWeights(),), Integer(3), torch.uint8),
        ("W2A16-g32", (SlimLlm(),), None, torch.uint8),
    ],
)  # fmt: skip
def test_a_dequantized_weight(
    scheme: str, passes: tuple[Pass, ...], format: NumberFormat | None, stored: torch.dtype
) -> None:
    gm = quantized(scheme, *FAKE, *passes)
    weight = DequantizedWeight.of(linear(gm).weight)
    assert weight.format == format and weight.dtype == torch.float32
    assert weight.group_size == 32 and weight.scale.target == "a.weight_scale"
    assert (weight.zero_point is None) == (scheme in ("W8A16", "W8A8_FP8", "W4A16-g32"))
    assert matmul_of(weight.codes) is matmul_of(weight.scale) is linear(gm).node
    assert weight.is_packed == (scheme == "W4A16-g32" and bool(passes))
    source = weight.codes if not weight.codes.args else operand(weight.codes, 0)
    assert source.meta["val"].dtype == stored
    if passes:
        assert weight.quantizer is None
    else:
        assert weight.quantizer == QuantizedWeight(weight.codes)
        assert weight.quantizer.weight_name == "a.weight"
        assert weight.quantizer.dequantized == weight
        assert weight.quantizer.group_size == 32 and weight.quantizer.format == format


def test_a_binary_weight() -> None:
    gm = quantized("W1A16-g32", *FAKE, BiLlm())
    weight = linear(gm).weight
    assert DequantizedWeight.match(weight) is None
    assert len(BinaryWeight.of(weight).stored) == 4


def test_what_is_something_else() -> None:
    gm, _ = trace_tiny(Pair(), torch.randn(3, 32))
    a = linear(gm)
    assert Linear.match(a.input) is Linear.match("a:linear") is Linear.match(None) is None
    with pytest.raises(TypeError, match=r"relu calls aten\.relu\.default, not aten::linear"):
        Linear.of(a.input)
    with pytest.raises(TypeError, match="argument 1 of cat is no node"):
        operand(results_of(gm)[1], 1)
    with pytest.raises(TypeError, match="no linear reads cat"):
        matmul_of(results_of(gm)[1])
    with pytest.raises(TypeError, match=r"output .* has no schema"):
        arguments(gm.graph.output_node())


def test_arguments_have_the_names_of_the_schema() -> None:
    gm, _ = trace_tiny(Pair(), torch.randn(3, 32))
    joined = results_of(gm)[1]
    assert arguments(joined) == {"tensors": operands_at(joined, 0), "dim": -1}
    assert len(operands_at(joined, 0)) == 2 and optional_operand(joined, 5) is None
    relu = linear(gm).input
    assert arguments(relu) == {"self": operand(relu, 0)}
    assert arguments(linear(gm, "b:linear").node)["bias"] is None


def test_positions_of_arguments_stay_in_the_ir() -> None:
    """Elsewhere `node.args[1]` would say nothing of what is read; a test may look."""
    folders = ("kernels", "lowering", "passes", "src/panguq")
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not path.resolve().is_relative_to(ROOT / "ir")
        for line in path.read_text().splitlines()
        if ".args[" in line
    }
    assert not found
    assert any(".args[" in path.read_text() for path in (ROOT / "ir").glob("*.py"))
