"""Single ops: what an exported file of one op computes is what PyTorch computes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from panguq.decibels import sqnr_db
from panguq.errors import PanguqError
from panguq.formats.onnx.export import export_graph
from panguq.formats.onnx.run import OnnxModel
from panguq.ir.edit import set_tensor
from panguq.ir.interface import Interface
from panguq.ir.node_meta import annotate
from panguq.ir.ops.packing import pack_int4
from panguq.ir.trace import trace_module
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.kernels.cpu import dequantized_linear, int4_linear  # noqa: F401  (registers the ops)

F = nn.functional
panguq, cpu, npu = torch.ops.panguq, torch.ops.panguq_cpu, torch.ops.npu


class Calls(nn.Module):
    """A module that is one function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def onnx_of(gm: fx.GraphModule, interface: Interface, *inputs: Tensor) -> Tensor:
    """The (first) result of a graph in onnxruntime."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_graph(gm, interface, path)
        names = dict(zip(interface.inputs, inputs, strict=True))
        return next(iter(OnnxModel(path, interface).run(names).values()))


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add with alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "arange": lambda x, y: x + torch.arange(x.shape[1], dtype=torch.float32),
    "comparisons": lambda x, y: torch.where(torch.logical_and(x > y, ~(x <= 0.5)), x, y) * (x != y),
    "cumsum": lambda x, y: x.cumsum(1),
    "div": lambda x, y: x / (y.abs() + 1),
    "exp and log": lambda x, y: (x.exp() + 1).log(),
    "expand": lambda x, y: x[:, :1].expand(-1, y.shape[1]) + y,
    "full": lambda x, y: x + torch.full((x.shape[0], 1), 2.5),
    "geglu": lambda x, y: panguq.geglu(x, y, "none") + panguq.geglu(y, x, "tanh"),
    "gelu": lambda x, y: F.gelu(x) + F.gelu(y, approximate="tanh"),
    "index": lambda x, y: x[:, torch.arange(2)],
    "integers": lambda x, y: (x * 3).to(torch.int64) + 1,
    "layer norm with an offset": lambda x, y: panguq.layer_norm(x, y[0], y[1], 1e-5, 1.0),
    "layer norm without weight": lambda x, y: F.layer_norm(x, (8,)),
    "masked fill": lambda x, y: x.masked_fill(y > 0, -math.inf).softmax(-1),
    "matmul": lambda x, y: x @ y.t(),
    "maximum": lambda x, y: torch.maximum(x, y) - torch.minimum(x, -y),
    "mean and sum": lambda x, y: x.mean(-1, keepdim=True) + y.sum(0),
    "new ones": lambda x, y: x * x.new_ones(x.shape[1]),
    "npu geglu": lambda x, y: npu.npu_geglu(x, -1, 0, True)[0] + npu.npu_geglu(y)[0],
    "npu gelu": lambda x, y: npu.npu_gelu(x) + npu.npu_gelu(y, approximate="tanh"),
    "npu rotary of neighbours": lambda x, y: npu.npu_rotary_mul(
        *(t.view(-1, 1, 8) for t in (x, y, y + 1)), "interleave"
    ),
    "ones like": lambda x, y: torch.ones_like(x) + torch.zeros_like(y),
    "permute": lambda x, y: x.reshape(-1, 2, 4).permute(2, 0, 1) + 1,
    "pow": lambda x, y: x.abs() ** 1.5,
    "repeat interleave": lambda x, y: x.repeat_interleave(3, dim=1),
    "reshape": lambda x, y: x.view(x.shape[0], 2, -1) + 1,
    "rms norm with an offset": lambda x, y: panguq.rms_norm(x, y[0], 1e-5, 1.0, True),
    "rotary of halves": lambda x, y: panguq.rotary(
        x.view(-1, 1, 1, 8), y.view(-1, 1, 8), (y + 1).view(-1, 1, 8)
    ),
    "rotary of neighbours": lambda x, y: panguq.rotary(
        x.view(-1, 1, 1, 8), y.view(-1, 1, 8), (y + 1).view(-1, 1, 8), True
    ),
    "rsqrt": lambda x, y: (x.abs() + 1).rsqrt() + (y.abs() + 1).reciprocal(),
    "rsub": lambda x, y: 1 - x,
    "select": lambda x, y: x[:, 3] + y[:, -1],
    "size arithmetic": lambda x, y: torch.cat((x, y), 0)[: x.shape[0] + 1],
    "slice": lambda x, y: x[1:, 2:7:2] + y[1:, -3:],
    "split": lambda x, y: x.split([3, 5], 1)[1] * y.view(-1, 8).chunk(2, 1)[0][:, :1],
    "squeeze": lambda x, y: x.unsqueeze(1).squeeze(1) + y,
    "stack": lambda x, y: torch.stack((x, y), 1).transpose(0, 1),
    "tanh and sigmoid": lambda x, y: x.tanh() * y.sigmoid(),
    "triangles": lambda x, y: torch.tril(x, 1) + torch.triu(y),
    "unbind": lambda x, y: x.unbind(1)[2] - y.unbind(1)[0],
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_computes_what_it_does_in_pytorch(name: str) -> None:
    module = Calls(OPS[name])
    gm, interface = trace_module(module, (torch.randn(4, 8), torch.randn(4, 8)))
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(6, 8, generator=generator) for _ in range(2))
    expected, found = module(x, y), onnx_of(gm, interface, x, y)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if expected.is_floating_point():
        finite = expected.isfinite()
        assert torch.equal(finite, found.isfinite())
        assert sqnr_db(expected[finite], found[finite]) >= 100
    else:
        assert torch.equal(expected, found)


# --- one call of one op -------------------------------------------------------------------------


def calling(
    op: object,
    shape: tuple[int | str, ...],
    stored: dict[str, Tensor],
    *rest: object,
    item: int = -1,
) -> tuple[fx.GraphModule, Interface]:
    """A graph that calls `op(x, *stored, *rest)`; with `item`, that result of it."""
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    annotate(x, label="x", stored_type=f"float32[{', '.join(map(str, shape))}]")
    weights = []
    for name, tensor in stored.items():
        set_tensor(root, name, tensor)
        weights.append(graph.get_attr(name))
        annotate(weights[-1], label=name)
    node = graph.call_function(op, (x, *weights, *rest))  # type: ignore[arg-type]
    annotate(node, label="result")
    if item >= 0:
        node = graph.call_function(operator.getitem, (node, item))
        annotate(node, label="item")
    graph.output((node,))
    interface = Interface(
        kind="module",
        inputs=("x",),
        outputs=("y",),
        input_shapes={"x": shape},
        float_dtype="float32",
    )
    return fx.GraphModule(root, graph), interface


VALUES = st.lists(
    st.floats(-300, 300, width=32, allow_subnormal=False), min_size=16, max_size=16
).map(lambda values: torch.tensor(values).reshape(2, 8))


@given(x=VALUES)
def test_codes_per_token_are_exact(x: Tensor) -> None:
    gm, interface = calling(panguq.quantize_per_token.default, ("m", 8), {}, 127, item=0)
    assert torch.equal(onnx_of(gm, interface, x), panguq.quantize_per_token(x, 127)[0])
    gm, interface = calling(panguq.quantize_per_token.default, ("m", 8), {}, 127, item=1)
    assert torch.equal(onnx_of(gm, interface, x), panguq.quantize_per_token(x, 127)[1])


@given(x=VALUES, scale=st.floats(2**-10, 4, width=32), zero_point=st.integers(-128, 127))
def test_static_codes_differ_by_one_at_most_and_only_next_to_a_half(
    x: Tensor, scale: float, zero_point: int
) -> None:
    stored = {"scale": torch.tensor([scale]), "zero": torch.tensor([zero_point], dtype=torch.int32)}
    op = panguq.quantize_per_tensor.default
    gm, interface = calling(op, ("m", 8), stored, -128, 127)
    expected = op(x, *stored.values(), -128, 127)
    found = onnx_of(gm, interface, x)
    differs = found != expected
    exact = x.double() / torch.tensor(scale).double()
    from_half = ((exact - exact.floor()) - 0.5).abs()
    assert bool((from_half[differs] <= exact[differs].abs() * 2**-22).all())
    assert int((found.int() - expected.int()).abs().max()) <= 1


@given(x=VALUES, factor=st.floats(2**-4, 8, width=16), offset=st.integers(-128, 127))
def test_codes_of_npu_quantize_are_exact(x: Tensor, factor: float, offset: int) -> None:
    stored = {"factor": torch.tensor([factor]), "offset": torch.tensor([float(offset)])}
    rest = (12, -1, False)
    gm, interface = calling(npu.npu_quantize.default, ("m", 8), stored, *rest)
    expected = npu.npu_quantize(x, *stored.values(), *rest)
    assert torch.equal(onnx_of(gm, interface, x), expected)


@pytest.mark.parametrize("quant_min, quant_max", [(-128, 127), (-127, 127), (-8, 7), (-7, 7)])
@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("with_zero_point", [False, True])
def test_weights_are_quantized_and_dequantized_exactly(
    quant_min: int, quant_max: int, group_size: int, with_zero_point: bool
) -> None:
    generator = torch.Generator().manual_seed(quant_max)
    weight = torch.randn(6, 32, generator=generator) * quant_max
    scale = torch.rand(6, 32 // group_size, generator=generator) + 0.5
    zero = torch.randint(-3, 4, scale.shape, generator=generator, dtype=torch.int32)
    point = zero if with_zero_point else None

    class FakeQuant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in (("weight", weight), ("scale", scale), ("zero", point)):
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            steps = (self.scale, self.zero, group_size)
            codes = panguq.quantize_weight(self.weight, *steps, quant_min, quant_max)
            return x * panguq.dequantize_weight(codes, *steps, torch.float32)

    ones = torch.ones(6, 32)
    gm, interface = trace_module(FakeQuant(), (ones,))
    assert torch.equal(onnx_of(gm, interface, ones), FakeQuant()(ones))


@given(seed=st.integers(0, 1000), group_size=st.sampled_from([16, 32, 64]), zero=st.booleans())
def test_four_bit_weights_arrive_exactly(seed: int, group_size: int, zero: bool) -> None:
    """x is the identity, so that the result is the dequantized weight."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (16, 64), generator=generator, dtype=torch.int8)
    scale = torch.rand(16, 64 // group_size, generator=generator)
    point = torch.randint(-8, 8, scale.shape, generator=generator, dtype=torch.int32)
    stored = {"codes": pack_int4(codes), "scale": scale, **({"point": point} if zero else {})}
    rest = [] if zero else [None]
    op = cpu.dequantized_linear.default
    gm, interface = calling(op, ("m", 64), stored, *rest, group_size, None, torch.float32)
    found = onnx_of(gm, interface, torch.eye(64)).t()
    weight = panguq.dequantize_weight(
        codes, scale, point if zero else None, group_size, torch.float32
    )
    assert torch.equal(found, weight)


def test_attention_of_groups_with_and_without_a_mask() -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
            return panguq.attention(query, key, key, mask, 0.3)

    shapes = ((2, 4, 5, 16), (2, 2, 7, 16), (2, 4, 5, 7))
    generator = torch.Generator().manual_seed(0)
    query, key, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    causal = torch.ones(5, 7, dtype=torch.bool).tril(2).expand(2, 4, 5, 7)
    for mask in (causal, bias):
        gm, interface = trace_module(Attention(), (query, key, mask))
        found = onnx_of(gm, interface, query, key, mask)
        assert sqnr_db(Attention()(query, key, mask), found) >= 100


@pytest.mark.parametrize("aligned_to_last", [True, False])
def test_causal_attention_over_a_past(aligned_to_last: bool) -> None:
    """panguq's empty mask counts from the last key, PyTorch's is_causal from the first."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("empty", torch.empty(0, dtype=torch.bool))

        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            if aligned_to_last:
                return panguq.attention(query, key, key, self.empty, 0.25)
            return F.scaled_dot_product_attention(query, key, key, is_causal=True)

    query, key = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 8, 16)
    gm, interface = trace_module(Causal(), (query, key))
    found = onnx_of(gm, interface, query, key)
    assert sqnr_db(Causal()(query, key), found) >= 100


def test_what_is_not_written_says_so() -> None:
    gm, interface = calling(
        npu.npu_quantize.default,
        ("m", 8),
        {"scale": torch.ones(1), "zero": torch.zeros(1)},
        16,
        -1,
        False,
    )
    with pytest.raises(PanguqError, match=r"node result \(npu.npu_quantize.default\): only int8"):
        onnx_of(gm, interface, torch.ones(2, 8))
