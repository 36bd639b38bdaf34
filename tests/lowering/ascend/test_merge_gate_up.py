"""gate and up become one matmul exactly where every output keeps its own numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from panguq.errors import RecipeError
from panguq.ir.edit import call, find_label, get_tensor, label, tensor_node, weights_of
from panguq.ir.node_meta import annotate, scheme_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import parse_scheme
from panguq.ir.run.interpret import run, values
from panguq.ir.text.printer import print_graph
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.lowering.ascend.merge_gate_up import MergeGateUp
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import Pass, PassContext
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.schedule import check_passes
from tests.model_shelf import (
    canonical,
    family_context,
    run_passes,
    run_pipeline,
    tiny_context,
    trace_tiny,
)

linear = torch.ops.aten.linear.default
SCHEMES = ("W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16-g32", "W4A16_ASYM-g32")


class Gated(nn.Module):
    """A gated MLP of k = 32 inputs and f = 24 inner ones; `up_of` says what up reads."""

    def __init__(
        self,
        gate_bias: bool = False,
        up_bias: bool = False,
        up_of=lambda x: x,
        activation=functional.silu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(32, 24, bias=gate_bias)
        self.up = nn.Linear(32, 24, bias=up_bias)
        self.down = nn.Linear(24, 32, bias=False)
        self.up_of = up_of

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(self.up_of(x)))


def fake_quant(
    module: nn.Module, scheme: str, dtype: torch.dtype = torch.float32
) -> tuple[fx.GraphModule, PassContext, Tensor]:
    """The module's graph with integer codes (or in float), its context and an input."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32).to(dtype)
    gm, interface = trace_tiny(module.to(dtype), x)
    ctx = tiny_context(interface, x)
    quantizing = [InsertFakeQuant(), QuantizeWeights()] if scheme != "FLOAT" else []
    run_passes(gm, ctx, scheme, Calibrate(), *quantizing)
    return gm, ctx, x


def merge(gm: fx.GraphModule, ctx: PassContext) -> tuple[int, list[str]]:
    """Run the pass through the runner, proof and checks included: rewrites and reasons.

    The proof computes both graphs in float64, where one matmul and two differ by its rounding.
    """
    held = frozenset({Property.SCHEMES, Property.QDQ, Property.STATISTICS, Property.CALIBRATED})
    held |= {Property.CANONICAL}
    quantized = any("dequantize_weight" in str(n.target) for n in gm.graph.nodes)
    held = held if quantized else held - {Property.QDQ}
    record = run_pipeline(gm, [MergeGateUp()], ctx, held=held)[0][0]
    assert record.proved_difference is not None and record.proved_difference < 1e-14
    return record.result.changed, [skip.reason for skip in record.result.skipped]


# --- where it happens ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["FLOAT", *SCHEMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_output_keeps_its_numbers(scheme, dtype) -> None:
    """Stacked tensors are the two stacks of rows; so is the weight that they give, to the bit.

    The sums over k may be taken in another order, for that is up to a library's kernel for n.
    """
    gm, ctx, x = fake_quant(Gated(), scheme, dtype)
    before, names = weights_of(gm), ("gate:linear", "up:linear")
    old = [find_label(gm, name) for name in names]
    source = old[0].args[0]
    read_weights = [n.args[1] for n in old]
    read = values(gm, {"x": x}, [*old, source, *read_weights])
    assert merge(gm, ctx) == (1, [])
    for name, tensor in weights_of(gm).items():
        if "gate_up_proj" in name:
            leaf = name.removeprefix("gate_up_proj.")
            assert torch.equal(tensor, torch.cat([before[f"gate.{leaf}"], before[f"up.{leaf}"]]))
    matmul = next(n for n in gm.graph.nodes if n.target is linear)
    assert tuple(matmul.meta["val"].shape[-1:]) == (48,)
    assert scheme_of(matmul) == parse_scheme(scheme)
    new = [find_label(gm, name) for name in names]
    now = values(gm, {"x": x}, [*new, matmul.args[1]])
    weights = [read[weight] for weight in read_weights]
    assert torch.equal(now[matmul.args[1]], torch.cat(weights))
    for (one, other), weight in zip(zip(old, new, strict=True), weights, strict=True):
        terms = read[source].abs().float() @ weight.abs().float().t()
        summation = 2 * 32 * torch.finfo(torch.float32).eps * terms
        rounding = torch.finfo(dtype).eps * read[one].abs().float()
        assert ((read[one].float() - now[other].float()).abs() <= summation + rounding).all()


def test_a_gate_may_go_through_gelu() -> None:
    gm, ctx, _ = fake_quant(Gated(activation=functional.gelu), "W8A8")
    assert merge(gm, ctx) == (1, [])


@pytest.mark.parametrize("scheme", ["FLOAT", "W8A8", "W4A16_ASYM-g32"])
def test_golden(golden, scheme) -> None:
    gm, ctx, _ = fake_quant(Gated(gate_bias=True), scheme)
    merge(gm, ctx)
    golden(f"merge_gate_up_{scheme.lower().replace('-', '_')}", print_graph(gm))


@given(st.data())
def test_packed_rows_stay_apart(data) -> None:
    """Codes of 4 bits are packed along a row: stacking bytes is stacking rows."""
    sizes = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    k = 2 * data.draw(st.integers(1, 9))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    codes = [torch.randint(-8, 8, (n, k), generator=seed, dtype=torch.int8) for n in sizes]
    packed = torch.cat([torch.ops.panguq.pack_int4(c) for c in codes])
    assert torch.equal(torch.ops.panguq.unpack_int4(packed), torch.cat(codes))


@pytest.mark.parametrize(("gate_bias", "up_bias"), [(True, True), (True, False), (False, True)])
def test_a_missing_bias_counts_as_zeros(gate_bias, up_bias) -> None:
    module = Gated(gate_bias, up_bias)
    gm, ctx, _ = fake_quant(module, "W8A16")
    assert merge(gm, ctx) == (1, [])
    zeros = torch.zeros(24)
    parts = [module.gate.bias if gate_bias else zeros, module.up.bias if up_bias else zeros]
    assert torch.equal(get_tensor(gm, "gate_up_proj.bias"), torch.cat(parts))


def test_labels_name_what_they_named() -> None:
    """`gate:linear` and `up:linear` still yield the results of gate and up."""
    gm, ctx, _ = fake_quant(Gated(), "W8A8_DYNAMIC")
    shape = find_label(gm, "gate:linear").meta["val"].shape
    merge(gm, ctx)
    for name, start in (("gate:linear", 0), ("up:linear", 24)):
        part = find_label(gm, name)
        assert part.target is torch.ops.aten.slice.Tensor
        assert part.args[1:] == (-1, start, start + 24)
        assert part.meta["val"].shape == shape


def test_what_was_merged_is_not_kept() -> None:
    gm, ctx, _ = fake_quant(Gated(True, True), "W8A8")
    merge(gm, ctx)
    assert not [name for name in weights_of(gm) if name.startswith(("gate.weight", "up.weight"))]
    assert {name for name, _ in gm.named_buffers()} == set(weights_of(gm))


@pytest.mark.parametrize("scheme", ["FLOAT", *SCHEMES])
def test_a_whole_model(scheme) -> None:
    """Every layer of a tiny Llama, with its sizes left symbolic."""
    gm, _ = canonical("llama")
    ctx = family_context("llama")
    quantizing = [InsertFakeQuant(), QuantizeWeights()] if scheme != "FLOAT" else []
    run_passes(gm, ctx, scheme, Calibrate(), *quantizing)
    assert ctx.probe is not None
    before = run(gm, ctx.probe)
    assert merge(gm, ctx) == (2, [])
    for expected, actual in zip(before, run(gm, ctx.probe), strict=True):
        torch.testing.assert_close(actual, expected)
    text = print_graph(gm)
    assert "%model.layers.1.mlp.gate_proj:linear.gate_up : f32[batch, seq, 192]" in text


def test_a_second_run_finds_nothing() -> None:
    gm, ctx, _ = fake_quant(Gated(), "W8A8")
    merge(gm, ctx)
    changed, reasons = merge(gm, ctx)
    assert (changed, reasons) == (0, ["gate is gate:linear, not a matmul"])


# --- where it does not --------------------------------------------------------------------------


class Reused(Gated):
    """Its gate's result is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(functional.silu(gate) * self.up(x)) + gate.sum()


class Tied(Gated):
    """One weight serves as gate and as a second projection."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gate(x + 1).sum()


class Squared(Gated):
    """Gate and up are one matmul."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(functional.silu(gate) * gate)


class Scaled(Gated):
    """Its up is not a matmul."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * (self.up(x) * 2))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Gated(up_of=lambda x: x + 1), "gate reads x, up reads add"),
        (Reused(), "gate gate:linear has other readers"),
        (Squared(), "gate and up are one matmul"),
        (Scaled(), "up is mul, not a matmul"),
    ],
)
@pytest.mark.parametrize("scheme", ["FLOAT", "W8A16"])
def test_what_is_left_alone(module, reason, scheme) -> None:
    gm, ctx, _ = fake_quant(module, scheme)
    before, weights = print_graph(gm), weights_of(gm)
    assert merge(gm, ctx) == (0, [reason])
    assert print_graph(gm) == before
    assert all(weights_of(gm)[name] is tensor for name, tensor in weights.items())


@pytest.mark.parametrize("scheme", ["FLOAT", "W8A16", "W4A16-g32"])
def test_a_shared_weight_is_not_stored_twice(scheme) -> None:
    gm, ctx, _ = fake_quant(Tied(), scheme)
    changed, (reason,) = merge(gm, ctx)
    assert changed == 0 and "has other readers" in reason


def test_schemes_must_agree() -> None:
    gm, ctx, _ = fake_quant(Gated(), "W8A16")
    annotate(find_label(gm, "up:linear"), scheme=parse_scheme("W4A16"))
    assert merge(gm, ctx) == (0, ["their schemes differ: W8A16 and W4A16"])


def test_group_sizes_must_agree() -> None:
    gm, ctx, _ = fake_quant(Gated(), "W4A16-g32")
    weight = find_label(gm, "up:linear").args[1]
    weight.update_arg(3, 16)
    changed, (reason,) = merge(gm, ctx)
    assert (changed, reason) == (0, "gate:linear.weight and up:linear.weight differ: 32 and 16")


def test_zero_points_must_be_on_both_sides_or_on_none() -> None:
    gm, ctx, _ = fake_quant(Gated(), "W4A16_ASYM-g32")
    find_label(gm, "up:linear").args[1].update_arg(2, None)
    changed, (reason,) = merge(gm, ctx)
    assert changed == 0 and reason.startswith("gate:linear.weight and up:linear.weight differ")


def test_biases_must_have_one_dtype() -> None:
    gm, ctx, _ = fake_quant(Gated(True, True), "W8A16")
    node = find_label(gm, "up:linear")
    node.update_arg(2, tensor_node(node, "up.narrow", torch.zeros(24, dtype=torch.bfloat16)))
    assert merge(gm, ctx) == (0, ["their biases differ in dtype"])


def test_a_computed_weight_is_left_alone() -> None:
    gm, ctx, _ = fake_quant(Gated(), "FLOAT")
    for name in ("gate:linear", "up:linear"):
        node = find_label(gm, name)
        args = (node.args[1],)
        node.update_arg(1, call(node, torch.ops.aten.neg.default, args, origin=node, suffix=".w"))
    changed, (reason,) = merge(gm, ctx)
    assert changed == 0 and "is not known to keep the rows" in reason


class Wide(nn.Module):
    """A gated MLP whose two projections together have too many outputs for a quantized matmul."""

    def __init__(self, f: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(2, f, bias=False), nn.Linear(2, f, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.gate(x)) * self.up(x)


@pytest.mark.parametrize(
    ("f", "scheme", "merged"),
    [
        (ATLAS_A2.largest_dimension // 2, "W8A16", 1),
        (ATLAS_A2.largest_dimension // 2 + 1, "W8A16", 0),
        (ATLAS_A2.largest_dimension // 2 + 1, "FLOAT", 1),
    ],
)
def test_not_more_outputs_than_a_quantized_matmul_may_have(f, scheme, merged) -> None:
    x = torch.randn(3, 2)
    gm, interface = trace_tiny(Wide(f), x)
    ctx = tiny_context(interface, x)
    quantizing = [InsertFakeQuant(), QuantizeWeights()] if scheme != "FLOAT" else []
    run_passes(gm, ctx, scheme, *quantizing)
    result = MergeGateUp().run(gm, ctx)
    assert result.changed == merged
    if not merged:
        reason = (
            f"{2 * f} outputs are more than the {ATLAS_A2.largest_dimension} of a quantized matmul"
        )
        assert [s.reason for s in result.skipped] == [reason]


# --- order --------------------------------------------------------------------------------------


def test_it_waits_for_the_codes() -> None:
    schemes: list[Pass] = [AssignSchemes(schemes=(("*", "W8A16"),))]
    held = frozenset({Property.CANONICAL, Property.FLOAT_MATMULS})
    with pytest.raises(RecipeError, match="merge-gate-up needs WEIGHT_CODES"):
        check_passes([*schemes, InsertFakeQuant(), MergeGateUp()], held)
    check_passes([*schemes, InsertFakeQuant(), QuantizeWeights(), MergeGateUp()], held)
    check_passes([AssignSchemes(), MergeGateUp()], held)


def test_large_tensors_go_into_files() -> None:
    gm, ctx, _ = fake_quant(Gated(), "W8A8")
    ctx.store.in_memory_bytes = 0
    merge(gm, ctx)
    codes = get_tensor(gm, "gate_up_proj.weight_codes")
    assert codes.untyped_storage().is_shared()
    assert label(find_label(gm, "gate_up_proj.weight_codes")) == "gate_up_proj.weight_codes"
