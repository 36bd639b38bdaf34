"""Fused ops stand where their documented formula is that of what they replace, and nowhere else."""

from __future__ import annotations

import operator
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from panguq.data.inputs import prepare, takes_empty_mask
from panguq.errors import RecipeError
from panguq.ir.edit import call, clone, find_label, finish, label, op_name, tensor_node, weights_of
from panguq.ir.interface import Interface
from panguq.ir.properties import Property
from panguq.ir.run.equivalence import run_in_float64
from panguq.ir.run.interpret import run, values
from panguq.ir.text.printer import print_graph
from panguq.ir.text.serialize import from_text, to_text
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.ir.verify import verify
from panguq.kernels.ascend.vendor.contracts import violations
from panguq.lowering.ascend.fuse_ascend import FuseAscend
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import PassContext
from panguq.passes.pipeline.runner import PassRecord
from panguq.schedule import check_passes
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import FAMILIES, make_model, run_pipeline, token_ids, trace_tiny

aten = torch.ops.aten
npu = torch.ops.npu
panguq = torch.ops.panguq

HALVES = (torch.bfloat16, torch.float16)
HELD = frozenset({Property.CANONICAL, Property.LOWERED})
FLOAT32_SLACK = 64 * torch.finfo(torch.float32).eps  # sums over at most 48 terms, and some more


def fuse(gm: fx.GraphModule, interface: Interface, **options: bool) -> PassRecord:
    """Run the pass through the runner, checks included."""
    ctx = PassContext(interface, WeightStore())
    (record,), held = run_pipeline(gm, [FuseAscend(**options)], ctx, held=HELD)
    assert held == HELD | {Property.ASCEND_OPS}
    return record


def ops(gm: fx.GraphModule) -> Counter[str]:
    """How often each op is called, items of tuples left out."""
    names = (op_name(n) for n in gm.graph.nodes if n.op == "call_function")
    return Counter(name for name in names if name != "getitem")


def reasons(record: PassRecord) -> list[str]:
    return [skip.reason for skip in record.result.skipped]


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to this dtype."""
    return torch.finfo(dtype).eps / 2


def same_graph_in_float64(gm: fx.GraphModule, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The graph's results in float64, from the same weights and inputs."""
    placeholders = {n: inputs[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder"}
    results = next(reversed(gm.graph.nodes)).args[0]
    found = run_in_float64(gm, placeholders, list(results))
    return tuple(found[node] for node in results)


def compare(
    module: nn.Module, *examples: Tensor, roundings: int, scale=lambda exact: exact.abs()
) -> tuple[fx.GraphModule, PassRecord]:
    """Fuse; the results stay within `roundings` roundings of `scale` of what float64 gives."""
    gm, interface = trace_tiny(module, *examples)
    inputs = dict(zip(interface.inputs, examples, strict=True))
    expected = same_graph_in_float64(gm, inputs)
    record = fuse(gm, interface)
    for exact, actual in zip(expected, run(gm, inputs), strict=True):
        bound = (roundings * unit(actual.dtype) + FLOAT32_SLACK) * scale(exact)
        tiny = torch.finfo(actual.dtype).smallest_normal
        assert ((actual.double() - exact).abs() <= bound + tiny).all()
    return gm, record


class Function(nn.Module):
    """A function of the inputs and of one weight of 48 numbers."""

    def __init__(self, function, weight_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.rand(48) + 0.5)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self.weight, *inputs)


def normals(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' models write it."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normalized.to(x.dtype)


# --- rms_norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rms_norm(dtype) -> None:
    module = Function(lambda w, x: norm(x, w)).to(dtype)
    gm, record = compare(module, normals(3, 5, 48, dtype=dtype), roundings=2)
    assert ops(gm) == {"npu_rms_norm": 1}
    assert reasons(record) == []
    assert find_label(gm, "rms_norm").meta["val"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_sum_and_its_norm(dtype) -> None:
    """The sum's other readers get the very sum that they read before."""

    def residual(w: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return norm(total, w), total.relu()

    x, y = normals(3, 5, 48, dtype=dtype), normals(3, 5, 48, dtype=dtype, seed=1)
    gm, interface = trace_tiny(Function(residual).to(dtype), x, y)
    record = fuse(gm, interface)
    assert ops(gm) == {"npu_add_rms_norm": 1, "relu": 1}
    assert reasons(record) == []
    normed, passed_on = run(gm, dict(zip(interface.inputs, (x, y), strict=True)))
    assert torch.equal(passed_on, (x + y).relu())
    exact = norm((x + y).double(), get_weight(gm).double())
    bound = (2 * unit(dtype) + FLOAT32_SLACK) * exact.abs()
    # float16 and bfloat16 kernels differ in whether the sum is rounded before it is squared
    bound = bound + unit(dtype) * (x.double().abs() + y.double().abs()) * exact.abs().max()
    assert ((normed.double() - exact).abs() <= bound).all()


def get_weight(gm: fx.GraphModule) -> Tensor:
    return weights_of(gm)["weight"]


def test_a_reader_of_the_sum_may_come_before_the_norm() -> None:
    def early(w: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        first = total.relu()
        return first, norm(total, w)

    x, y = normals(3, 5, 48), normals(3, 5, 48, seed=1)
    gm, interface = trace_tiny(Function(early), x, y)
    nodes = {label(n): n for n in gm.graph.nodes}
    nodes["rms_norm"].prepend(nodes["weight"])  # read as late as can be
    finish(gm)
    fuse(gm, interface)
    assert ops(gm) == {"npu_add_rms_norm": 1, "relu": 1}
    assert torch.equal(run(gm, {"inputs_0": x, "inputs_1": y})[0], (x + y).relu())


def test_one_sum_and_two_norms() -> None:
    """The first norm takes the sum, the second reads it."""

    def twice(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return norm(total, w) + norm(total, w + 0).relu() + norm(total, w)

    gm, interface = trace_tiny(Function(twice), normals(3, 5, 48), normals(3, 5, 48))
    fuse(gm, interface)
    assert ops(gm)["npu_add_rms_norm"] == 1 and ops(gm)["npu_rms_norm"] >= 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda w, x, y: norm(x + 1.0, w) + y, "it is not a plain sum of two tensors"),
        (lambda w, x, y: norm(torch.add(x, y, alpha=2), w), "it is not a plain sum of two tensors"),
        (lambda w, x, y: norm(x + y[:, :1], w), "is broadcast"),
        (lambda w, x, y: norm(x + w, w) + y, "weight is broadcast"),
        (lambda w, x, y: norm(x + y.half(), w), "has another dtype than the sum"),
    ],
)
def test_what_is_no_plain_sum(function, reason) -> None:
    x, y = normals(3, 5, 48), normals(3, 5, 48, seed=1).half().float()
    gm, record = compare(
        Function(function), x, y, roundings=4, scale=lambda exact: exact.abs().max()
    )
    assert ops(gm)["npu_rms_norm"] == 1 and ops(gm)["npu_add_rms_norm"] == 0
    assert [r for r in reasons(record) if reason in r]


def test_what_the_vendors_norm_does_not_take_is_spelled_in_aten() -> None:
    """float64: the same formula, to the last bit but one."""
    x = normals(3, 5, 48).double()
    gm, record = compare(Function(lambda w, x: norm64(x, w)).double(), x, roundings=4)
    assert "npu_rms_norm" not in ops(gm) and ops(gm)["rsqrt"] == 1
    assert len(reasons(record)) == 1 and "float64" in reasons(record)[0]


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_norm_with_1_added_to_its_weight(dtype) -> None:
    """Of a sum, too: the vendor's norm of a sum takes no weight in float32."""

    def gemma(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        wide = (x + y).float()
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normalized * (1.0 + w.float())).type_as(x)

    x, y = normals(3, 5, 48, dtype=dtype), normals(3, 5, 48, dtype=dtype, seed=1)
    gm, interface = trace_tiny(Function(gemma).to(dtype), x, y)
    (before,) = run(gm, dict(zip(interface.inputs, (x, y), strict=True)))
    record = fuse(gm, interface)
    casts = {} if dtype == torch.float32 else {"to": 1}
    assert ops(gm) == {"add": 2, **casts, "npu_rms_norm": 1}  # the sum, and 1 + w
    assert [r for r in reasons(record) if "npu_add_rms_norm takes no weight in float32" in r]
    (after,) = run(gm, dict(zip(interface.inputs, (x, y), strict=True)))
    slack = 2 * unit(dtype) + FLOAT32_SLACK  # both round once
    torch.testing.assert_close(after, before, rtol=slack, atol=0)


def test_what_has_no_vendors_norm_keeps_its_offset() -> None:
    """float64, which no op takes; a layer norm."""

    def norms(w: Tensor, x: Tensor) -> Tensor:
        normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return functional.layer_norm(normalized * (2.0 + w), (48,), w + 1.0, w)

    x = normals(3, 5, 48).double()
    gm, _ = compare(Function(norms).double(), x, roundings=8, scale=lambda exact: exact.abs().max())
    assert not any(name.startswith("npu") for name in ops(gm))
    assert (ops(gm)["rsqrt"], ops(gm)["layer_norm"]) == (1, 1)


# --- swiglu -------------------------------------------------------------------------------------


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :24], x[..., 24:]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "split",
    [
        halves,
        lambda x: (x[..., 0:24], x[..., 24:48]),
        lambda x: x.chunk(2, dim=-1),
        lambda x: x.split(24, dim=2),
    ],
)
def test_swiglu_of_the_halves_of_one_tensor(split, dtype) -> None:
    def gated(w: Tensor, x: Tensor) -> Tensor:
        gate, up = split(x * w)
        return functional.silu(gate) * up

    gm, record = compare(Function(gated).to(dtype), 4 * normals(3, 5, 48, dtype=dtype), roundings=9)
    assert ops(gm) == {"mul": 1, "npu_swiglu": 1}
    assert reasons(record) == []


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (lambda x: halves(x)[::-1], "are not the first and the second half of"),
        (lambda x: (x[..., :24], x[..., 12:36]), "are not the first and the second half of"),
        (lambda x: (x[..., :12], x[..., 12:24]), "are not the first and the second half of"),
        (lambda x: (x[..., ::2], x[..., 1::2]), "gate and up are two tensors"),
        (lambda x: (x[..., :24], (x + 1)[..., 24:]), "gate and up are two tensors"),
        (lambda x: (x, x + 1), "gate and up are two tensors"),
        (lambda x: (x, x), "gate and up are two tensors"),
        (lambda x: (x[:, :2], x[:, 2:4]), "gate and up are two tensors"),
    ],
)
def test_what_is_no_vendors_swiglu(parts, reason) -> None:
    def gated(w: Tensor, x: Tensor) -> Tensor:
        gate, up = parts(x * w)
        return functional.silu(gate) * up

    gm, record = compare(Function(gated), normals(3, 5, 48), roundings=9)
    assert "npu_swiglu" not in ops(gm) and ops(gm)["silu"] == 1
    assert len(reasons(record)) == 1 and reason in reasons(record)[0]


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_geglu_of_the_halves_of_one_tensor(dtype, form) -> None:
    def gated(w: Tensor, x: Tensor) -> Tensor:
        gate, up = halves(x * w)
        return functional.gelu(gate, approximate=form) * up

    size = lambda exact: exact.abs() + 1e-2  # noqa: E731  (gelu cancels where x is negative)
    gm, record = compare(
        Function(gated).to(dtype), normals(3, 5, 48, dtype=dtype), roundings=9, scale=size
    )
    assert ops(gm) == {"mul": 1, "npu_geglu": 1}
    assert reasons(record) == []


def test_geglu_of_two_tensors_is_spelled_in_aten() -> None:
    def gated(w: Tensor, x: Tensor) -> Tensor:
        return functional.gelu(x * w, approximate="tanh") * (x + 1)

    size = lambda exact: exact.abs() + 1e-1  # noqa: E731
    gm, record = compare(Function(gated), normals(3, 5, 48), roundings=9, scale=size)
    (gelu,) = [n for n in gm.graph.nodes if n.target is npu.npu_gelu.default]
    assert gelu.kwargs == {"approximate": "tanh"}
    assert reasons(record) == ["gate and up are two tensors, and npu_geglu reads the halves of one"]


def test_gelu_is_the_vendors_which_knows_both_forms() -> None:
    both = lambda w, x: functional.gelu(x * w) + functional.gelu(x, approximate="tanh")  # noqa: E731
    size = lambda exact: exact.abs() + 1e-1  # noqa: E731
    gm, _ = compare(Function(both), normals(3, 5, 48), roundings=9, scale=size)
    assert ops(gm) == {"mul": 1, "npu_gelu": 2, "add": 1}
    gm, record = compare(
        Function(both).double(), normals(3, 5, 48).double(), roundings=9, scale=size
    )
    assert ops(gm)["gelu"] == 2 and all("float64" in reason for reason in reasons(record))


# --- rotary -------------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, seq, 48] as [batch, 3, seq, 16], its size known to the trace."""
    return x.to(dtype).reshape(x.shape[0], x.shape[1], 3, 16).transpose(1, 2)


def rotary_of(dtype: torch.dtype, table_dtype: torch.dtype | None = None, factor: float = 1.0):
    """x turned by angles, as models do it: tables in float32, cast to x's dtype."""

    def function(w: Tensor, x: Tensor, angles: Tensor) -> Tensor:
        angles = angles * w[:16].float()
        cos, sin = (t.to(table_dtype or dtype) for t in (angles.cos(), angles.sin()))
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        query = heads(x * w, dtype)
        return turn(query, cos, sin) + turn(query.relu(), cos, sin)

    return Function(function)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rotary(dtype) -> None:
    """Both embeddings read the tables through one view of them."""
    gm, interface = trace_tiny(rotary_of(dtype), normals(3, 5, 48), normals(3, 5, 16))
    before = clone(gm)
    record = fuse(gm, interface)
    counts = ops(gm)
    assert (counts["npu_rotary_mul"], counts["unsqueeze"]) == (2, 2)
    assert reasons(record) == []
    tables = [n for n in gm.graph.nodes if n.target is aten.unsqueeze.default]
    assert [tuple(t.meta["val"].shape[2:]) for t in tables] == [(1, 16), (1, 16)]
    inputs = {"inputs_0": normals(3, 5, 48), "inputs_1": normals(3, 5, 16)}
    (old,), (new,) = run(before, inputs), run(gm, inputs)
    (exact,) = same_graph_in_float64(before, inputs)
    # each of the two: a product and a sum rounded, of values of at most sqrt(2) |x|
    largest = exact.abs().max() + 4 * (normals(3, 5, 48).abs() * 1.5).max()
    bound = (8 * unit(dtype) + FLOAT32_SLACK) * largest
    assert (new.double() - exact).abs().max() <= bound
    assert (new.double() - old.double()).abs().max() <= 2 * bound


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (rotary_of(torch.float32, factor=1.5), "may leave [-1, 1]"),
        (
            Function(lambda w, x, a: turn(heads(x * w, torch.float32), a * w[:16], a.sin())),
            "may leave [-1, 1]",
        ),
    ],
)
def test_tables_beyond_one_are_not_for_the_vendors_rotary(module, reason) -> None:
    x, angles = normals(3, 5, 48), normals(3, 5, 16)
    gm, record = compare(module, x, angles, roundings=16, scale=lambda exact: exact.abs().max())
    assert "npu_rotary_mul" not in ops(gm) and ops(gm)["neg"] >= 1
    assert reasons(record) and all(reason in r for r in reasons(record))


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rotary_of_neighbours_is_spelled_in_aten(dtype) -> None:
    """torchair drops the mode, and halves would be turned."""

    def function(w: Tensor, x: Tensor, angles: Tensor) -> Tensor:
        angles = (angles * w[:8].float()).repeat_interleave(2, dim=-1)
        cos, sin = (t.to(dtype).unsqueeze(1) for t in (angles.cos(), angles.sin()))
        query = heads(x * w, dtype)
        return query * cos + rotate_pairs(query) * sin

    x, angles = normals(3, 5, 48, dtype=dtype), normals(3, 5, 8)
    gm, record = compare(
        Function(function).to(dtype), x, angles, roundings=8, scale=lambda exact: exact.abs().max()
    )
    assert "npu_rotary_mul" not in ops(gm) and ops(gm)["stack"] == 1
    assert reasons(record) == ["torchair drops the mode of npu_rotary_mul that turns neighbours"]


def test_tables_are_cast_to_the_dtype_of_what_they_turn() -> None:
    """As in Cohere: float32 queries, tables in 16 bits."""
    wide = lambda w, x, a: turn(heads(x * w, torch.float32), a.cos().half(), a.sin().half())  # noqa: E731
    gm, _ = compare(
        Function(wide), normals(3, 5, 48), normals(3, 5, 16), roundings=8,
        scale=lambda exact: exact.abs().max() * 2**13,  # the reference does not round the tables
    )  # fmt: skip
    assert ops(gm)["npu_rotary_mul"] == 1


class StoredTables(nn.Module):
    """Rotary tables kept as a buffer, looked up by position."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        angles = torch.arange(32.0)[:, None] * torch.linspace(1, 0.1, 16)
        self.register_buffer("cos", angles.cos() * factor)
        self.register_buffer("sin", angles.sin() * factor)
        self.weight = nn.Parameter(torch.rand(48))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return turn(heads(x * self.weight, x.dtype), self.cos[positions], self.sin[positions])


@pytest.mark.parametrize(("factor", "fused"), [(1.0, 1), (1.01, 0)])
def test_stored_tables_are_looked_at(factor, fused) -> None:
    positions = torch.arange(5).expand(3, 5)
    x = normals(3, 5, 48)
    gm, _ = compare(
        StoredTables(factor), x, positions, roundings=8, scale=lambda exact: exact.abs().max()
    )
    assert ops(gm)["npu_rotary_mul"] == fused


# --- attention ----------------------------------------------------------------------------------


class Attention(nn.Module):
    """4 heads of 16 over 2 key and value heads; the mask is what `mask_of` makes of the given."""

    def __init__(self, mask_of=lambda mask: mask) -> None:
        super().__init__()
        self.mask_of = mask_of
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.rand(4, 1, 16) + 0.5)  # its sizes fix the heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        query, key, value = query * self.weight, key * self.weight[:2], value * self.weight[2:]
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        mask = self.mask_of(mask.unsqueeze(1))
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class CausalAttention(nn.Module):
    """Plain causal attention, as it is written without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(48) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = heads(x * self.weight, x.dtype)
        first = functional.scaled_dot_product_attention(x, x.relu(), x, is_causal=True)
        return functional.scaled_dot_product_attention(first, x, x, is_causal=True)


def attention_inputs(seq: int, past: int, dtype: torch.dtype, batch: int = 2) -> dict[str, Tensor]:
    """Query, key, value, and a causal mask in which the first sequence's first key is padding."""
    total = past + seq
    mask = torch.ones(batch, seq, total, dtype=torch.bool).tril(past)
    mask[0, :, 0] = False
    mask |= torch.ones(seq, total, dtype=torch.bool).tril(past).triu(past)
    return {
        "query": normals(batch, 4, seq, 16, dtype=dtype),
        "key": normals(batch, 2, total, 16, dtype=dtype, seed=1),
        "value": normals(batch, 2, total, 16, dtype=dtype, seed=2),
        "mask": mask,
    }


def attention_graph(module: nn.Module, dtype: torch.dtype) -> tuple[fx.GraphModule, Interface]:
    return trace_tiny(module.to(dtype), *attention_inputs(5, 3, dtype).values())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("seq", "past"), [(5, 3), (4, 0), (1, 6), (1, 0)])
def test_attention(dtype, seq, past) -> None:
    gm, interface = attention_graph(Attention(), dtype)
    before = clone(gm)
    record = fuse(gm, interface)
    counts = ops(gm)
    assert (counts["npu_fused_infer_attention_score"], counts["logical_not"]) == (1, 1)
    assert reasons(record) == []
    inputs = attention_inputs(seq, past, dtype)
    (exact,) = same_graph_in_float64(before, inputs)
    (actual,) = run(gm, inputs)
    # weights and result are rounded; a result is an average of values
    bound = (4 * unit(dtype) + FLOAT32_SLACK) * (inputs["value"].abs().max() * 1.5)
    assert (actual.double() - exact).abs().max() <= bound


class CappedAttention(Attention):
    """Attention with a cap of its scores and a sink for every head."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        query, key, value = query * self.weight, key * self.weight[:2], value * self.weight[2:]
        sinks, mask = self.weight[:, 0, 0], mask.unsqueeze(1)
        return panguq.attention(query, key, value, mask, 0.25, sinks, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_sinks_and_capped_scores_are_spelled_in_aten(dtype) -> None:
    gm, interface = attention_graph(CappedAttention(), dtype)
    before = clone(gm)
    record = fuse(gm, interface)
    (reason,) = reasons(record)
    assert "no sinks and no cap" in reason
    for seq, past in ((5, 3), (1, 6)):
        inputs = attention_inputs(seq, past, dtype)
        (exact,) = same_graph_in_float64(before, inputs)
        (actual,) = run(gm, inputs)
        bound = (4 * unit(dtype) + FLOAT32_SLACK) * (inputs["value"].abs().max() * 1.5)
        assert (actual.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", HALVES)
def test_hidden_keys_have_no_influence(dtype) -> None:
    """The mask's sense is turned: what a query may not see does not matter, and all else does."""
    gm, interface = attention_graph(Attention(), dtype)
    fuse(gm, interface)
    inputs = attention_inputs(5, 3, dtype)
    (expected,) = run(gm, inputs)
    for position in range(8):
        seen = inputs["mask"][:, :, position]
        changed = inputs["value"].clone()
        changed[:, :, position] += 8
        (actual,) = run(gm, {**inputs, "value": changed})
        rows = (actual != expected).any(-1).all(1)
        assert torch.equal(rows, seen)


def test_the_op_gets_contiguous_tensors() -> None:
    """A query that was turned and a sliced key are copied, a concatenated value is not."""

    class Joined(Attention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            query, key, value = query * self.weight, key * self.weight[:2], value * self.weight[2:]
            query = query.transpose(1, 2).relu().transpose(1, 2)
            key = torch.cat([key, key], dim=2)[:, :, : mask.shape[-1]]
            value = torch.cat([value, value[:, :, :0]], dim=2)
            key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
            mask = mask.unsqueeze(1)
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    gm, interface = attention_graph(Joined(), torch.bfloat16)
    fuse(gm, interface)
    copied = [n.args[0].target for n in gm.graph.nodes if n.target is aten.contiguous.default]
    assert copied == [aten.transpose.int, aten.slice.Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_causal_mask_is_made_from_the_sizes(dtype) -> None:
    """Once for both layers, with symbolic sizes."""
    x = normals(2, 6, 48, dtype=dtype)
    gm, interface = trace_tiny(CausalAttention().to(dtype), x)
    before = clone(gm)
    record = fuse(gm, interface)
    counts = ops(gm)
    fused = dtype != torch.float32
    assert counts["npu_fused_infer_attention_score"] == (2 if fused else 0)
    assert (counts["triu"], counts["tril"]) == ((1, 0) if fused else (0, 1))
    assert len(reasons(record)) == (0 if fused else 2)
    for seq in (1, 2, 9):
        x = normals(2, seq, 48, dtype=dtype)
        (exact,), (actual,) = (f({"x": x}) for f in (
            lambda i: same_graph_in_float64(before, i), lambda i: run(gm, i)))  # fmt: skip
        bound = (8 * unit(dtype) + FLOAT32_SLACK) * (x.abs().max() * 1.5)
        assert (actual.double() - exact).abs().max() <= bound


@given(st.integers(1, 6), st.integers(0, 6), st.booleans())
def test_an_empty_mask_with_a_past(seq, past, wide) -> None:
    """Query i sees the keys 0 ... past + i, in the fused op and in aten's spelling."""
    dtype = torch.float32 if wide else torch.bfloat16
    gm, _ = causal_with_past(dtype)
    inputs = attention_inputs(seq, past, dtype, batch=1)
    mask = torch.ones(1, 1, seq, past + seq, dtype=torch.bool).tril(past)
    (actual,) = run(gm, {**inputs, "mask": torch.empty(0, dtype=torch.bool)})
    weight = weights_of(gm)["weight"]
    query, key, value = inputs["query"] * weight, inputs["key"] * weight[:2], inputs["value"]
    value = value * weight[2:]
    expected = panguq.attention(query.double(), key.double(), value.double(), mask, 0.25)
    bound = (4 * unit(dtype) + FLOAT32_SLACK) * value.double().abs().max()
    assert (actual.double() - expected).abs().max() <= bound


_CAUSAL: dict[torch.dtype, tuple[fx.GraphModule, Interface]] = {}


def causal_with_past(dtype: torch.dtype) -> tuple[fx.GraphModule, Interface]:
    """A fused graph whose attention had an empty stored mask and more keys than queries."""
    if dtype not in _CAUSAL:
        gm, interface = attention_graph(Attention(), dtype)
        node = next(n for n in gm.graph.nodes if n.target is panguq.attention.default)
        node.update_arg(3, tensor_node(node, "causal_mask", torch.empty(0, dtype=torch.bool)))
        finish(gm)
        fuse(gm, interface)
        _CAUSAL[dtype] = gm, interface
    return _CAUSAL[dtype]


@pytest.mark.parametrize(
    ("mask_of", "dtype", "reason"),
    [
        (lambda m: m.to(torch.bfloat16) * -9.0, torch.bfloat16, "is added to the scores"),
        (lambda m: m.expand(-1, 4, -1, -1), torch.bfloat16, "differs from head to head"),
        (lambda m: m[:, :, :1], torch.bfloat16, "not one row a query over all keys"),
        (lambda m: m, torch.float32, "float32"),
    ],
)
def test_what_the_vendors_attention_does_not_take(mask_of, dtype, reason) -> None:
    """It is spelled in aten ops, which give the canonical op's bits."""
    gm, interface = attention_graph(Attention(mask_of), dtype)
    before = clone(gm)
    record = fuse(gm, interface)
    counts = ops(gm)
    assert "npu_fused_infer_attention_score" not in counts
    assert (counts["scaled_dot_product_attention"], counts["repeat_interleave"]) == (1, 2)
    assert len(reasons(record)) == 1 and reason in reasons(record)[0]
    assert not counts["logical_not"]
    inputs = attention_inputs(5, 3, dtype)
    assert torch.equal(run(gm, inputs)[0], run(before, inputs)[0])


def test_heads_must_be_fixed() -> None:
    """The op takes their number as a constant."""
    x = normals(2, 4, 6, 16, dtype=torch.bfloat16)

    class AnyHeads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.25)

    gm, interface = trace_tiny(AnyHeads(), x)
    before = clone(gm)
    record = fuse(gm, interface)
    assert reasons(record) == ["the number of heads is not fixed"]
    for heads_given in (2, 5):
        x = normals(2, heads_given, 3, 16, dtype=torch.bfloat16)
        torch.testing.assert_close(run(gm, {"x": x}), run(before, {"x": x}))


# --- quantization -------------------------------------------------------------------------------


def quantized(
    quantizer: str, dtype: torch.dtype, k: int = 48, reread: bool = False
) -> tuple[fx.GraphModule, Interface]:
    """`quantizer(norm(x + y))` and the sum, as lowering leaves it: W8A8, static or dynamic."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(k) + 0.5)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            total = x + y
            normed = norm(total, self.weight)
            return (normed, total.relu(), *((normed.abs(),) if reread else ()))

    torch.manual_seed(0)
    examples = normals(3, 5, k, dtype=dtype), normals(3, 5, k, dtype=dtype, seed=1)
    gm, interface = trace_tiny(Residual().to(dtype), *examples)
    output = next(reversed(gm.graph.nodes))
    normed, *rest = output.args[0]
    if quantizer == "static":
        scale = tensor_node(output, "input_inverse_scale", torch.tensor([31.0], dtype=dtype))
        zero = tensor_node(output, "input_zero_point", torch.tensor([-7.0], dtype=dtype))
        args = (normed, scale, zero, torch.qint8, -1, False)
        results = [call(output, npu.npu_quantize.default, args, origin=normed, suffix=".codes")]
    else:
        op = npu.npu_dynamic_quant.default
        pair = call(output, op, (normed,), origin=normed, suffix=".quantize")
        results = [
            call(output, operator.getitem, (pair, i), origin=normed, suffix=f".{name}")
            for i, name in enumerate(("codes", "scale"))
        ]
    output.args = (tuple([*results, *rest]),)
    finish(gm)
    return gm, interface


def two_inputs(dtype: torch.dtype, k: int = 48) -> dict[str, Tensor]:
    return {"x": normals(9, 7, k, dtype=dtype, seed=3), "y": normals(9, 7, k, dtype=dtype, seed=4)}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("quantizer", ["static", "dynamic"])
def test_codes_are_not_changed_unless_that_is_allowed(quantizer, dtype) -> None:
    gm, interface = quantized(quantizer, dtype)
    record = fuse(gm, interface)
    name = {"static": "npu_quantize", "dynamic": "npu_dynamic_quant"}[quantizer]
    assert ops(gm) == {"npu_add_rms_norm": 1, name: 1, "relu": 1}
    assert len(reasons(record)) == 1 and "allow_inexact permits it" in reasons(record)[0]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("quantizer", ["static", "dynamic"])
def test_fused_quantization_rounds_elsewhere(quantizer, dtype) -> None:
    """The sum stays what it was; codes are those of a norm that was not rounded to 16 bits.

    Unfused, the sum, the norm, its product with the weight, and through them the root and a
    dynamic scale, are rounded or computed from rounded values: eight roundings of up to 127.
    """
    gm, interface = quantized(quantizer, dtype)
    plain = clone(gm)
    fuse(plain, interface)
    record = fuse(gm, interface, allow_inexact=True)
    name = {"static": "npu_add_rms_norm_quant", "dynamic": "npu_add_rms_norm_dynamic_quant"}
    assert ops(gm) == {name[quantizer]: 1, "relu": 1}
    assert reasons(record) == []
    inputs = two_inputs(dtype)
    before, after = run(plain, inputs), run(gm, inputs)
    assert torch.equal(before[-1], after[-1])
    assert after[0].dtype == torch.int8
    moved = (before[0].int() - after[0].int()).abs()
    assert moved.max() <= int(1 + 127 * 8 * unit(dtype))
    if dtype == torch.bfloat16:
        assert moved.any()  # this is why it must be allowed
    if quantizer == "dynamic":
        torch.testing.assert_close(after[1], before[1], rtol=4 * unit(dtype), atol=0)


@pytest.mark.parametrize("quantizer", ["static", "dynamic"])
def test_readers_of_the_norms_sizes_read_them_elsewhere(quantizer) -> None:
    """As lowering reads sizes of a matmul's input to give its result their shape."""
    gm, interface = quantized(quantizer, torch.bfloat16)
    normed = find_label(gm, "rms_norm")
    output = next(reversed(gm.graph.nodes))
    codes, *rest = output.args[0]
    size = call(output, aten.sym_size.int, (normed, 0), origin=normed, suffix=".size_0")
    flat = call(output, aten.reshape.default, (codes, [size, -1]), origin=codes, suffix=".flat")
    output.args = ((flat, *rest),)
    finish(gm)
    fuse(gm, interface, allow_inexact=True)
    assert ops(gm)["npu_add_rms_norm"] == 0
    assert run(gm, two_inputs(torch.bfloat16))[0].shape == (9, 7 * 48)


def test_scale_and_zero_point_become_one_a_column() -> None:
    """float16 wants float32 scales and int32 zero points, bfloat16 both in bfloat16."""
    for dtype, wanted in (
        (torch.float16, (torch.float32, torch.int32)),
        (torch.bfloat16, (torch.bfloat16, torch.bfloat16)),
    ):
        gm, interface = quantized("static", dtype)
        fuse(gm, interface, allow_inexact=True)
        node = next(n for n in gm.graph.nodes if n.target is npu.npu_add_rms_norm_quant.default)
        scales, zeros = (n.meta["val"] for n in node.args[3:5])
        assert (scales.dtype, zeros.dtype) == wanted
        assert scales.shape == zeros.shape == (48,)
        assert node.kwargs["div_mode"] is False


@pytest.mark.parametrize(
    ("quantizer", "options", "reason"),
    [
        ("static", {"k": 40}, "are not aligned to 32 bytes"),
        ("dynamic", {"k": 40}, "are not aligned to 32 bytes"),
        ("static", {"reread": True}, "rms_norm has other readers"),
        ("dynamic", {"reread": True}, "rms_norm has other readers"),
    ],
)
def test_where_quantization_is_not_fused(quantizer, options, reason) -> None:
    gm, interface = quantized(quantizer, torch.bfloat16, **options)
    record = fuse(gm, interface, allow_inexact=True)
    assert ops(gm)["npu_add_rms_norm"] == 1
    assert [r for r in reasons(record) if reason in r]


def test_codes_of_four_bits_are_not_fused() -> None:
    gm, interface = quantized("dynamic", torch.bfloat16)
    node = next(n for n in gm.graph.nodes if n.target is npu.npu_dynamic_quant.default)
    new = call(
        node, node.target, node.args, {"dst_type": torch.quint4x2}, origin=node, suffix=".four"
    )
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    finish(gm)
    record = fuse(gm, interface, allow_inexact=True)
    assert "only plain int8 codes per token can be fused" in reasons(record)


# --- whole models -------------------------------------------------------------------------------


def model_graph(family: str, dtype: torch.dtype) -> tuple[fx.GraphModule, Interface]:
    gm, interface = trace_causal_lm(make_model(family).to(dtype))
    Canonicalize().run(gm, PassContext(interface, WeightStore()))
    return gm, interface


def test_golden(golden) -> None:
    gm, interface = model_graph("llama", torch.bfloat16)
    fuse(gm, interface)
    golden("fuse_ascend_llama", print_graph(gm))


def test_the_table_counts_every_rewrite() -> None:
    gm, interface = model_graph("llama", torch.bfloat16)
    assert fuse(gm, interface).result.tables["fusions"].rows == (
        ("attention -> npu_fused_infer_attention_score", 2),
        ("rms_norm -> npu_add_rms_norm", 4),
        ("rms_norm -> npu_rms_norm", 1),
        ("rotary -> npu_rotary_mul", 4),
        ("swiglu -> aten", 2),
    )


def noise(exact: Tensor, actual: Tensor) -> float:
    return float((actual.double() - exact).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_its_cache(family, dtype) -> None:
    """A prompt with padding, then a decoding step on the cache that the prompt left.

    What the fused graph adds to the error of its dtype, measured against float64, is less than
    that error itself (3 dB).
    """
    gm, interface = model_graph(family, dtype)
    before = clone(gm)
    fuse(gm, interface)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    prompt = prepare(interface, token_ids(2, 9), mask)
    exact, old, new = (
        same_graph_in_float64(before, prompt), run(before, prompt), run(gm, prompt)
    )  # fmt: skip
    for reference, one, other in zip(exact, old, new, strict=True):
        assert other.dtype == one.dtype and other.shape == one.shape
        assert noise(reference, other) <= 2 * noise(reference, one)
    grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    step = prepare(interface, token_ids(2, 1, seed=1), grown, past=new[1:])
    exact, old, new = (
        same_graph_in_float64(before, step), run(before, step), run(gm, step)
    )  # fmt: skip
    assert noise(exact[0], new[0]) <= 2 * noise(exact[0], old[0])
    for name, cached in zip(interface.inputs[4:], new[1:], strict=True):
        assert torch.equal(cached[:, :, :9], step[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_is_legal_with_the_sizes_that_it_meets(family) -> None:
    """A prompt and a decoding step of three sequences, each op's contract on its real inputs."""
    gm, interface = model_graph(family, torch.bfloat16)
    fuse(gm, interface)
    prompt = prepare(interface, token_ids(3, 9))
    step = prepare(interface, token_ids(3, 1), past=run(gm, prompt)[1:])
    calls = [n for n in gm.graph.nodes if str(n.target).startswith("npu.")]
    assert calls
    for inputs in (prompt, step):
        found = values(gm, inputs, [n for n in gm.graph.nodes if n.op != "output"])
        for node in calls:
            args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            assert violations(node.target, args, kwargs) == []


def test_sizes_stay_symbolic() -> None:
    gm, interface = model_graph("llama", torch.bfloat16)
    before = types(gm)
    fuse(gm, interface)
    kept = {name: kind for name, kind in types(gm).items() if name in before}
    assert kept == {name: before[name] for name in kept}
    assert kept["model.layers.1.self_attn:attention"] == "bf16[batch, 4, seq, 16]"
    assert kept["model.layers.1.self_attn:cat"] == "bf16[batch, 2, past + seq, 16]"


def types(gm: fx.GraphModule) -> dict[str, str]:
    """Dtype and shape, with the names of sizes, of every value by its label."""
    lines = [line.split(" : ") for line in print_graph(gm).splitlines() if line.startswith("%")]
    return {name[1:]: rest.split(" = ")[0] for name, rest in lines}


def test_an_empty_mask_says_nothing_to_a_fused_graph() -> None:
    gm, interface = model_graph("llama", torch.bfloat16)
    assert takes_empty_mask(gm)
    fuse(gm, interface)
    assert not takes_empty_mask(gm)


def test_a_fused_graph_can_be_saved() -> None:
    gm, interface = model_graph("llama", torch.bfloat16)
    fuse(gm, interface)
    again = from_text(to_text(gm), weights_of(gm))
    inputs = prepare(interface, token_ids(2, 9))
    for one, other in zip(run(gm, inputs), run(again, inputs), strict=True):
        assert torch.equal(one, other)


def test_a_second_run_finds_nothing() -> None:
    gm, interface = model_graph("llama", torch.bfloat16)
    fuse(gm, interface)
    text = print_graph(gm)
    assert fuse(gm, interface).result.changed == 0
    assert print_graph(gm) == text


# --- the property -------------------------------------------------------------------------------


def test_what_an_npu_does_not_know_is_found() -> None:
    gm, interface = model_graph("llama", torch.bfloat16)
    with pytest.raises(
        Exception, match="calls panguq::rms_norm, which an Ascend NPU does not know"
    ):
        verify(gm, {Property.ASCEND_OPS}, after="the test")
    fuse(gm, interface)
    verify(gm, {Property.ASCEND_OPS}, after="the test")


def test_it_waits_for_lowering() -> None:
    with pytest.raises(RecipeError, match="fuse-ascend needs LOWERED"):
        check_passes([FuseAscend()], frozenset({Property.CANONICAL}))
