"""Each pattern is raised where it stands, and nowhere else; the function stays the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from panguq.errors import TraceError
from panguq.ir.canonical_views import RmsNorm
from panguq.ir.edit import label, op_name
from panguq.ir.properties import TRACED, Property
from panguq.ir.run.interpret import run
from panguq.ir.text.printer import print_graph
from panguq.ir.trace import trace_module
from panguq.ir.verify import verify
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import PassContext
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import FAMILIES, canonical, run_pipeline, traced

X = (3, 5, 8)


def ops_after(module: nn.Module, *examples: Tensor) -> Counter[str]:
    """Canonicalize through the runner, proof and checks included; the ops that remain."""
    gm, interface = trace_module(module.eval(), examples or (torch.randn(X),))
    fed = dict(zip(interface.inputs, examples or (torch.randn(X),), strict=True))
    before = run(gm, fed)
    run_pipeline(gm, [Canonicalize()], PassContext(interface, WeightStore()))
    for expected, actual in zip(before, run(gm, fed), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    return Counter(op_name(n) for n in gm.graph.nodes if n.op == "call_function")


class HeadsOfEight(nn.Module):
    """A function of `[batch, heads, seq, 8]` inputs and of others; the 8 is fixed by a weight."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, *inputs: Tensor) -> Tensor:
        fixed = [x + self.weight if x.is_floating_point() else x for x in inputs]
        return self.function(*fixed)


def ops_of_heads(function, *examples: Tensor) -> Counter[str]:
    counts = ops_after(HeadsOfEight(function), *examples)
    counts["add"] -= sum(x.is_floating_point() for x in examples)
    return +counts


class Expression(nn.Module):
    """A function of the input, with a norm weight at hand."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.weight, *inputs)


# --- whole families -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_golden(golden, family) -> None:
    golden(f"canonicalize_{family}", print_graph(canonical(family)[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_twice_is_once(family) -> None:
    gm, interface = canonical(family)
    before = print_graph(gm)
    result = Canonicalize().run(gm, PassContext(interface, WeightStore()))
    assert (result.changed, print_graph(gm)) == (0, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_proved_and_verified(family) -> None:
    gm, interface = traced(family)
    records, held = run_pipeline(gm, [Canonicalize()], PassContext(interface, WeightStore()))
    assert records[0].proved_difference is not None
    assert records[0].proved_difference < 1e-6
    assert held == TRACED | {Property.CANONICAL}


def test_sizes_are_read_once_after_the_inputs() -> None:
    """Size readers follow the last input, and no size is read twice."""
    gm, _ = canonical("llama")
    nodes = list(gm.graph.nodes)
    inputs = [i for i, n in enumerate(nodes) if n.op == "placeholder"]
    sizes = [i for i, n in enumerate(nodes) if n.target is torch.ops.aten.sym_size.int]
    assert sizes == list(range(inputs[-1] + 1, inputs[-1] + 1 + len(sizes)))
    assert len({(nodes[i].args[0], nodes[i].args[1]) for i in sizes}) == len(sizes) > 1


class SizesFirst(nn.Module):
    """Its graph begins with the reading of sizes: two that are kept, read more than once."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        batch, seq, rows = y.shape[0], x.shape[1], x.shape[0]
        return x.new_zeros(batch, seq) + y.new_ones(rows, seq).sum() + torch.zeros(batch, seq)


def test_a_graph_that_begins_with_sizes() -> None:
    remaining = ops_after(SizesFirst(), torch.randn(3, 5), torch.randn(4, 6))
    assert remaining["sym_size"] == 3


def test_labels_name_module_and_op() -> None:
    gm, _ = canonical("llama")
    labels = [label(n) for n in gm.graph.nodes]
    for wanted in (
        "model.layers.0.self_attn.q_proj:linear",
        "model.layers.1.self_attn:attention",
        "model.layers.1.self_attn:rotary.1",
        "model.layers.0.post_attention_layernorm:rms_norm",
        "model.norm.weight",
        "lm_head:linear",
    ):
        assert labels.count(wanted) == 1, wanted
    verify(gm, {Property.CANONICAL}, after="the test")


# --- what tracing leaves behind -----------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: (x * 1.0).to(torch.float32).contiguous().clone().relu(),
        lambda w, x: x[:][:, :].detach().relu(),
        lambda w, x: functional.dropout(x, 0.5, training=False).relu(),
        lambda w, x: functional.dropout(x, 0.0, training=True).relu(),
    ],
)
def test_noise_goes(function) -> None:
    assert ops_after(Expression(function)) == {"relu": 1}


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda w, x: x * 2.0, "mul"),
        (lambda w, x: x.to(torch.float64), "to"),
        (lambda w, x: x[:, 1:], "slice"),
        (lambda w, x: x[:, ::2], "slice"),
        (lambda w, x: x[:, :3], "slice"),
    ],
)
def test_what_only_looks_like_noise_stays(function, kept) -> None:
    assert ops_after(Expression(function))[kept] == 1


def test_a_product_with_one_that_makes_floats_stays() -> None:
    assert ops_after(Expression(lambda w, x: x * 1.0), torch.arange(12).view(3, 4))["mul"] == 1


# --- matmuls ------------------------------------------------------------------------------------


class Matmul(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.vector = nn.Parameter(torch.randn(8))
        self.stack = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        forms = {
            "mm": lambda: torch.mm(rows, self.weight),
            "matmul": lambda: x @ self.weight,
            "addmm": lambda: torch.addmm(self.bias, rows, self.weight),
            "addmm with beta": lambda: torch.addmm(self.bias, rows, self.weight, beta=2.0),
            "vector": lambda: x @ self.vector,
            "stack": lambda: x @ self.stack,
            "weight on the left": lambda: self.weight.t() @ rows.t(),
            "two activations": lambda: x @ x.transpose(1, 2),
        }
        return forms[self.form]()


@pytest.mark.parametrize("form", ["mm", "matmul", "addmm"])
def test_a_stored_weight_gives_a_linear(form) -> None:
    counts = ops_after(Matmul(form))
    assert counts["linear"] == 1 and not counts["mm"] + counts["matmul"] + counts["addmm"]


@pytest.mark.parametrize(
    "form", ["addmm with beta", "vector", "stack", "weight on the left", "two activations"]
)
def test_other_products_are_no_linear(form) -> None:
    assert ops_after(Matmul(form))["linear"] == 0


# --- rms_norm -----------------------------------------------------------------------------------


def normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: w * normalize(x),
        lambda w, x: normalize(x) * w,
        lambda w, x: w * normalize(x.float()).to(x.dtype),
        lambda w, x: functional.rms_norm(x, (8,), w, 1e-6),
        lambda w, x: (1 + w) * normalize(x),
        lambda w, x: normalize(x.float()) * (1.0 + w.float()),
        lambda w, x: w * (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)),
        lambda w, x: w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)),
    ],
)
def test_rms_norm_is_raised(function) -> None:
    assert ops_after(Expression(function)) == {"rms_norm": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: normalize(x),  # no weight
        lambda w, x: x.abs().sum() * normalize(x),  # not a stored weight
        lambda w, x: (x[0] + w) * normalize(x),  # not a number and a stored weight
        lambda w, x: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),  # no eps
        lambda w, x: w * (x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6)),
        lambda w, x: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-6)),
        lambda w, x: w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda w, x: w * (x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    ],
)
def test_what_is_no_rms_norm(function) -> None:
    assert ops_after(Expression(function))["rms_norm"] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: (w * normalize(x.float())).to(x.dtype),  # OLMo 2
        lambda w, x: (w.float() * normalize(x.float())).to(x.dtype),  # Helium
        lambda w, x: (normalize(x.float()) * (1.0 + w.float())).type_as(x),  # Gemma
    ],
)
def test_a_norm_that_rounds_once(function) -> None:
    """In bfloat16 the graph gives the model's bits: rounded behind the weight, not before it."""
    module = Expression(function).bfloat16()
    x = torch.randn(X).bfloat16()
    gm, interface = trace_module(module.eval(), (x,))
    (expected,) = run(gm, {interface.inputs[0]: x})
    run_pipeline(gm, [Canonicalize()], PassContext(interface, WeightStore()))
    (norm,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert RmsNorm.of(norm).rounds_once
    assert torch.equal(run(gm, {interface.inputs[0]: x})[0], expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: (1 + w.bfloat16()).float() * normalize(x),  # a gain of 16 bits
        lambda w, x: (w * normalize(x.float()).bfloat16()).float() * 2,
    ],
)
def test_a_gain_that_was_rounded_is_not_raised(function) -> None:
    gm, interface = trace_module(Expression(function).eval(), (torch.randn(X),))
    run_pipeline(gm, [Canonicalize()], PassContext(interface, WeightStore()))
    assert not any(n.target is torch.ops.panguq.rms_norm.default for n in gm.graph.nodes)


def test_a_norm_that_widens_its_result_is_not_raised() -> None:
    """x is bfloat16, the result float32: the op would return bfloat16."""
    function = Expression(lambda w, x: w * normalize(x.float()))
    assert ops_after(function, torch.randn(X).bfloat16())["rms_norm"] == 0


# --- layer norm -------------------------------------------------------------------------------


def center(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda w, x: w * normalize(center(x)), "layer_norm"),
        (
            lambda w, x: (
                w * (center(x) * torch.rsqrt(center(x).pow(2).mean(-1, keepdim=True) + 1e-6))
            ),
            "layer_norm",
        ),
        (lambda w, x: functional.layer_norm(x, (8,), w + 1.0, w, 1e-5), "layer_norm"),
    ],
)
def test_layer_norm_is_raised(function, op) -> None:
    assert ops_after(Expression(function)) == {op: 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: (w.float() * normalize(center(x.float()))).to(x.dtype),  # Cohere
        lambda w, x: functional.layer_norm(x.float(), (8,), None, None, 1e-5).to(x.dtype),  # OLMo
    ],
)
def test_layer_norm_between_casts_is_one_op(function) -> None:
    module, x = Expression(function).bfloat16(), torch.randn(X).bfloat16()
    gm, interface = trace_module(module.eval(), (x,))
    (expected,) = run(gm, {interface.inputs[0]: x})
    run_pipeline(gm, [Canonicalize()], PassContext(interface, WeightStore()))
    assert [op_name(n) for n in gm.graph.nodes if n.op == "call_function"] == ["layer_norm"]
    (actual,) = run(gm, {interface.inputs[0]: x})
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)


def test_what_is_centered_by_another_mean_is_no_layer_norm() -> None:
    counts = ops_after(Expression(lambda w, x: w * normalize(x - x.mean(1, keepdim=True))))
    assert counts["rms_norm"] == 1 and counts["layer_norm"] == 0


# --- rotary -------------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotary_inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, 2, 5, 8), torch.randn(3, 5, 8), torch.randn(3, 5, 8)


def test_rotary_is_raised() -> None:
    counts = ops_of_heads(lambda x, c, s: turned(x, c, s, rotate_half(x)), *rotary_inputs())
    assert counts == {"rotary": 1}


def test_tables_wider_than_the_input_widen_it() -> None:
    """The op yields its input's dtype; this sum is float32."""

    def narrow(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        x = x.bfloat16()
        return turned(x, c, s, rotate_half(x))

    assert ops_of_heads(narrow, *rotary_inputs()) == {"to": 2, "rotary": 1}


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def test_rotary_of_neighbours_is_raised() -> None:
    counts = ops_of_heads(lambda x, c, s: turned(x, c, s, rotate_pairs(x)), *rotary_inputs())
    assert counts == {"rotary": 1}


def test_tables_of_halves_that_are_repeated_for_neighbours() -> None:
    """As in GLM: one table for all heads, made behind the axis of heads."""

    def pairs(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        cos, sin = (t.unsqueeze(1)[..., :4].repeat_interleave(2, dim=-1) for t in (c, s))
        return x * cos + rotate_pairs(x) * sin

    assert ops_of_heads(pairs, *rotary_inputs())["rotary"] == 1


def turned(x: Tensor, c: Tensor, s: Tensor, rotated: Tensor) -> Tensor:
    return x * c.unsqueeze(1) + rotated * s.unsqueeze(1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, c, s: turned(x, c, s, torch.cat((x[..., 4:], -x[..., :4]), -1)),
        lambda x, c, s: turned(x, c, s, torch.cat((-x[..., :4], x[..., 4:]), -1)),
        lambda x, c, s: turned(x, c, s, torch.cat((-x[..., 3:], x[..., :3]), -1)),
        lambda x, c, s: turned(x, c, s, torch.cat((-x[..., 6:], x[..., :6]), -1)),
        lambda x, c, s: turned(x, c, s, torch.cat((x[..., 4:], x[..., :4]), -1)),
        lambda x, c, s: turned(x, c, s, torch.cat((-x[:, 1:], x[:, :1]), 1)),
        lambda x, c, s: turned(x, c, s, torch.cat((-x[1:], x[:1]))),
        lambda x, c, s: turned(
            x, c, s, torch.cat((-x[..., 4:], x[..., :2], x[..., 2:4]), -1)
        ),
        lambda x, c, s: turned(x, c, s, rotate_half(x + 1)),
        lambda x, c, s: turned(x, c, s, rotate_pairs(x + 1)),
        lambda x, c, s: turned(x, c, s, -rotate_pairs(x)),
        lambda x, c, s: turned(
            x, c, s, torch.stack((-x[..., ::2], x[..., 1::2]), dim=-1).flatten(-2)
        ),
        lambda x, c, s: x * c.unsqueeze(1) - rotate_half(x) * s.unsqueeze(1),
        lambda x, c, s: torch.add(
            x * c.unsqueeze(1), rotate_half(x) * s.unsqueeze(1), alpha=2
        ),
    ],
)  # fmt: skip
def test_what_is_no_rotary(function) -> None:
    assert ops_of_heads(function, *rotary_inputs())["rotary"] == 0


# --- swiglu -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: functional.silu(x) * (x + 1),
        lambda w, x: (x + 1) * functional.silu(x),
        lambda w, x: functional.silu(x) * x,
    ],
)
def test_swiglu_is_raised(function) -> None:
    counts = ops_after(Expression(function))
    assert counts["swiglu"] == 1 and not counts["silu"] + counts["mul"]


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_geglu_is_raised(form) -> None:
    counts = ops_after(Expression(lambda w, x: (x + 1) * functional.gelu(x, approximate=form)))
    assert counts["geglu"] == 1 and not counts["gelu"] + counts["mul"] + counts["swiglu"]


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: functional.silu(x),
        lambda w, x: functional.silu(x) * 2.0,
        lambda w, x: functional.silu(x) * w,  # broadcast: a scale, not a gate
        lambda w, x: functional.silu(x) + (x + 1),
        lambda w, x: functional.silu(x.bfloat16()) * x,  # two dtypes
    ],
)
def test_what_is_no_swiglu(function) -> None:
    assert ops_after(Expression(function))["swiglu"] == 0


# --- attention ----------------------------------------------------------------------------------

attend = functional.scaled_dot_product_attention


def attention_inputs(kv_heads: int = 4) -> tuple[Tensor, ...]:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, kv_heads, 5, 8)
    return query, key, torch.randn(2, kv_heads, 5, 8), torch.ones(5, 5).tril().bool()


def repeated(x: Tensor, groups: int) -> Tensor:
    """Grouped heads as transformers spells them."""
    batch, heads, seq, d = x.shape
    return x[:, :, None].expand(batch, heads, groups, seq, d).reshape(batch, -1, seq, d)


@pytest.mark.parametrize(
    ("kv_heads", "function"),
    [
        (4, lambda q, k, v, m: attend(q, k, v)),
        (4, lambda q, k, v, m: attend(q, k, v, m)),
        (4, lambda q, k, v, m: attend(q, k, v, m, scale=0.3)),
        (4, lambda q, k, v, m: attend(q, k, v, is_causal=True)),
        (2, lambda q, k, v, m: attend(q, k, v, m, enable_gqa=True)),
        (2, lambda q, k, v, m: attend(q, repeated(k, 2), repeated(v, 2), m)),
        (2, lambda q, k, v, m: attend(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), m
        )),
    ],
)  # fmt: skip
def test_attention_is_raised(kv_heads, function) -> None:
    assert ops_of_heads(function, *attention_inputs(kv_heads)) == {"attention": 1}


@pytest.mark.parametrize(
    ("kv_heads", "function"),
    [
        (4, lambda q, k, v, m: attend(q[0], k[0], v[0], m)),  # without a batch
        (4, lambda q, k, v, m: attend(q, torch.cat((k, k), 2), torch.cat((v, v), 2),
                                      is_causal=True)),  # causal from the other end
        (2, lambda q, k, v, m: attend(q, repeated(k, 2), v.repeat(1, 2, 1, 1), m)),  # two ways
    ],
)  # fmt: skip
def test_other_attention_is_left_alone(kv_heads, function) -> None:
    counts = ops_of_heads(function, *attention_inputs(kv_heads))
    assert (counts["attention"], counts["scaled_dot_product_attention"]) == (0, 1)


def test_heads_repeated_in_another_order_stay_repeated() -> None:
    """`repeat` gives heads 0 1 0 1, not 0 0 1 1: grouped attention would mix them up."""
    counts = ops_of_heads(
        lambda q, k, v, m: attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), m),
        *attention_inputs(2),
    )
    assert counts["attention"] == 1 and counts["repeat"] == 2


def test_a_scale_that_follows_from_a_dynamic_size_is_left_alone() -> None:
    counts = ops_after(Expression(lambda w, q, k, v, m: attend(q, k, v, m)), *attention_inputs())
    assert counts == {"scaled_dot_product_attention": 1}


# --- ops that no graph may contain --------------------------------------------------------------


class Digamma(nn.Module):
    """An op that panguq does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return x.digamma()


class Unknown(nn.Module):
    """Two layers with an unknown op, and one in the forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Digamma(), Digamma())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x.lgamma()


def test_unknown_ops_are_named_with_their_modules_before_any_proof() -> None:
    gm, interface = trace_module(Unknown().eval(), (torch.randn(3, 8),))
    with pytest.raises(TraceError) as caught:
        run_pipeline(gm, [Canonicalize()], PassContext(interface, WeightStore()))
    assert caught.value.message == (
        "the model calls what panguq does not know: aten.digamma.default in module layers.0 and "
        "1 more; aten.lgamma.default in the model's own forward"
    )
    assert "docs/contributing/when-a-model-does-not-trace.md" in caught.value.hint
