"""One linear two ways: what the Ascend target runs, and what a server calls out of the checkpoint.

The servers' calls are those of vllm-ascend (quantization/methods) and MindIE-LLM (w4a8.py), spelled
with panguq's CPU bodies of the NPU ops. Where both sides call one op with the same operands,
results are equal bit for bit.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.formats.checkpoint.ascend_v1_tensors import linear_entries
from panguq.formats.checkpoint.linear import QuantizedLinear, read_linear
from panguq.ir.edit import clone
from panguq.ir.properties import Property
from panguq.ir.run.interpret import run
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers the ops)
from panguq.kernels.ascend.vendor.contracts import violations
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.weight_quant_matmul import BIAS_DTYPE
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.quantize_weights import QuantizeWeights
from tests.model_shelf import run_passes, run_pipeline, tiny_context, trace_tiny

npu = torch.ops.npu
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(64, 512), (24, 256)]
HELD = frozenset({Property.CANONICAL, Property.SCHEMES, Property.QDQ, Property.WEIGHT_CODES})


class One(nn.Module):
    def __init__(self, n: int, k: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(n)
        self.o_proj = nn.Linear(k, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(x)


def inputs(k: int, dtype: torch.dtype, *sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return (torch.randn(*sizes, k, generator=generator) - 0.3).to(dtype)


def both(
    scheme: str, n: int, k: int, bias: bool, dtype: torch.dtype, path: str = "fc"
) -> tuple[fx.GraphModule, QuantizedLinear, dict[str, Tensor]]:
    """The lowered graph, the linear, and the tensors that the checkpoint has of it."""
    gm, interface = trace_tiny(One(n, k, bias).to(dtype), inputs(k, dtype, 2, 3))
    ctx = tiny_context(interface, inputs(k, dtype, 4, 16))
    run_passes(gm, ctx, scheme, Calibrate(), InsertFakeQuant(), QuantizeWeights())
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    linear = read_linear(gm, path, node)
    lowered = clone(gm)
    run_pipeline(lowered, [LowerMatmuls("ascend910b1")], ctx, held=HELD)
    stored = {e.name.removeprefix(f"{path}."): e.output.make() for e in linear_entries(linear)}
    return lowered, linear, stored


def called(op: torch._ops.OpOverload, *args: object, **named: object) -> Tensor:
    """Call an NPU op, which its contract must allow."""
    assert violations(op, args, named) == []
    result: Tensor = op(*args, **named)
    return result


def static_call(stored: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """vllm-ascend, w8a8_static.py: parameters are cast when they are loaded."""
    k = x.shape[-1]
    scale = stored["input_scale"].to(dtype).repeat(k)
    offset = stored["input_offset"].to(torch.int8).repeat(k).to(dtype)
    codes = called(
        npu.npu_quantize.default, x, 1 / scale, offset, dtype_number(torch.qint8), -1, False
    )
    weight = stored["weight"].t().contiguous()
    return called(
        npu.npu_quant_matmul.default, codes, weight, stored["deq_scale"],
        bias=stored["quant_bias"], output_dtype=dtype_number(dtype),
    )  # fmt: skip


def dynamic_call(
    stored: dict[str, Tensor], x: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype
) -> Tensor:
    """vllm-ascend, w8a8_dynamic.py, its weight_scale in `scale_dtype`."""
    codes, token_scale = npu.npu_dynamic_quant(x)
    bias = stored["bias"].to(dtype) if "bias" in stored else None
    return called(
        npu.npu_quant_matmul.default, codes, stored["weight"].t().contiguous(),
        stored["weight_scale"].to(scale_dtype).flatten(),
        pertoken_scale=token_scale, bias=bias, output_dtype=dtype_number(dtype),
    )  # fmt: skip


def weight_only_call(stored: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """vllm-ascend, w8a16.py; the bias in the dtype that the op's page wants."""
    bias = stored["bias"].to(BIAS_DTYPE[dtype]) if "bias" in stored else None
    return called(
        npu.npu_weight_quant_batchmatmul.default, x, stored["weight"].t().contiguous(),
        stored["weight_scale"].to(dtype).flatten(), stored["weight_offset"].to(dtype).flatten(),
        bias=bias,
    )  # fmt: skip


def int8_by_int4_call(stored: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """MindIE-LLM, w4a8.py: bytes of two rows become words of eight columns."""
    weight = stored["weight"].t().contiguous().view(torch.int32)
    scale = (stored["weight_scale"] * stored["weight_scale_second"]).t().contiguous()
    scale = npu.npu_trans_quant_param(scale.reshape(-1)).reshape(scale.shape)
    codes, token_scale = npu.npu_dynamic_quant(x)
    return called(
        npu.npu_quant_matmul.default, codes, weight, scale,
        offset=stored["scale_bias"].sum(1), pertoken_scale=token_scale.reshape(-1, 1),
        output_dtype=dtype_number(dtype),
    )  # fmt: skip


def sqnr_db(expected: Tensor, actual: Tensor) -> float:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    noise = (expected.double() - actual.double()).square().sum().item()
    signal = expected.double().square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_w8a8_is_the_same_bits(n: int, k: int, bias: bool, dtype: torch.dtype) -> None:
    graph, linear, stored = both("W8A8", n, k, bias, dtype)
    x = inputs(k, dtype, 10)
    assert torch.equal(static_call(stored, x, dtype), run(graph, {"x": x[None]})[0][0])
    assert stored["deq_scale"].dtype == (torch.int64 if dtype == torch.float16 else torch.float32)
    assert torch.equal(stored["input_scale"], stored["input_scale"].to(dtype).float())
    assert ("bias" in stored) == (linear.bias is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_w8a8_dynamic_is_the_same_bits(n: int, k: int, bias: bool, dtype: torch.dtype) -> None:
    graph, _, stored = both("W8A8_DYNAMIC", n, k, bias, dtype)
    x = inputs(k, dtype, 10)
    expected = run(graph, {"x": x[None]})[0][0]
    assert torch.equal(dynamic_call(stored, x, dtype, torch.float32), expected)


def test_w8a8_dynamic_with_scales_in_bfloat16_is_the_same_bits() -> None:
    """vllm-ascend keeps weight_scale in the model's dtype, in which panguq chose it."""
    graph, _, stored = both("W8A8_DYNAMIC", 64, 512, False, torch.bfloat16)
    x = inputs(512, torch.bfloat16, 10)
    expected = run(graph, {"x": x[None]})[0][0]
    assert torch.equal(dynamic_call(stored, x, torch.bfloat16, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_w8a16_is_the_same_bits(n: int, k: int, bias: bool, dtype: torch.dtype) -> None:
    graph, _, stored = both("W8A16", n, k, bias, dtype)
    x = inputs(k, dtype, 10)
    assert torch.equal(weight_only_call(stored, x, dtype), run(graph, {"x": x[None]})[0][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["W4A8", "W4A8-per_channel"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_w4a8_is_the_same_bits(scheme: str, n: int, k: int, dtype: torch.dtype) -> None:
    graph, _, stored = both(scheme, n, k, False, dtype)
    x = inputs(k, dtype, 10)
    assert torch.equal(int8_by_int4_call(stored, x, dtype), run(graph, {"x": x[None]})[0][0])


@pytest.mark.parametrize(
    "path", ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
)
def test_a_split_scale_bias_sums_to_the_same(path: str) -> None:
    """Sixteen sums in float32 instead of one: the offset may differ in its last bit."""
    graph, _, stored = both("W4A8", 64, 512, False, torch.bfloat16, path)
    assert stored["scale_bias"].shape == (64, 16)
    x = inputs(512, torch.bfloat16, 10)
    result = int8_by_int4_call(stored, x, torch.bfloat16)
    assert sqnr_db(run(graph, {"x": x[None]})[0][0], result) >= 60
    quarter = int8_by_int4_call({**stored, "scale_bias": stored["scale_bias"][:, :4]}, x, x.dtype)
    assert sqnr_db(run(graph, {"x": x[None]})[0][0], quarter) < 60
