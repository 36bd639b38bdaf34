"""AWQ: the formula, the search against brute force, what is left alone, the function unchanged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

import panguq
from panguq.errors import InputError, NumericsError, RecipeError
from panguq.ir.analysis.channels import find_scale_sites
from panguq.ir.edit import clone, finish, get_tensor, weights_of
from panguq.ir.node_meta import annotate, scheme_of
from panguq.ir.quant_spec import Scheme, parse_scheme
from panguq.ir.run.interpret import run
from panguq.passes.awq import Awq, awq_scale
from panguq.passes.calibrate import Calibrate
from panguq.passes.codes.weight_scales import quantize_groups, search_scale
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import PassContext, PassResult, linears
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.scaling.folding import Factors, add_factors, fold
from panguq.passes.scaling.search import MatmulError, look_at
from tests.model_shelf import (
    canonical,
    family_context,
    make_model,
    run_passes,
    tiny_context,
    token_ids,
    trace_tiny,
)


class NormLinear(nn.Module):
    """norm ─► first, second: two channels are 30 times larger than others, and what they meet is
    10 times smaller, so that their columns may grow tenfold before they cost the others anything.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(64, eps=1e-6)
        self.first, self.second = nn.Linear(64, 24), nn.Linear(64, 8, bias=False)
        with torch.no_grad():
            self.norm.weight[::32] = 30.0
            self.first.weight[:, ::32] *= 0.1
            self.second.weight[:, ::32] *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.first(y), self.second(y)], -1)


def prepared(
    module: nn.Module | None = None,
    scheme: str | Scheme = "W4A16-g32",
    batches: tuple[Tensor, ...] | None = None,
) -> tuple[fx.GraphModule, PassContext]:
    if batches is None:
        generator = torch.Generator().manual_seed(1)
        batches = tuple(torch.randn(4, 20, 64, generator=generator) for _ in range(2))
    example = torch.zeros(2, 3, 64, dtype=batches[0].dtype)
    gm, interface = trace_tiny(module or NormLinear(), example)
    for node in linears(gm):
        annotate(node, scheme=parse_scheme(scheme) if isinstance(scheme, str) else scheme)
    return gm, tiny_context(interface, *batches)


def reason(result: PassResult, node: str = "norm:rms_norm") -> str:
    return next(skip.reason for skip in result.skipped if skip.node == node)


def table(result: PassResult) -> list[dict[str, object]]:
    scales = result.tables["scales"]
    return [dict(zip(scales.columns, row, strict=True)) for row in scales.rows]


# --- the formula --------------------------------------------------------------------------------


def test_scales_by_hand() -> None:
    scale = awq_scale(torch.tensor([16.0, 1.0, 4.0, 0.0]), 0.5)
    expected = torch.tensor([4.0, 1.0, 2.0, 2.0], dtype=torch.float64) / 2  # 2 = sqrt(4 * 1)
    assert torch.equal(scale, expected)
    assert torch.equal(awq_scale(torch.rand(5), 0.0), torch.ones(5, dtype=torch.float64))
    assert torch.equal(awq_scale(torch.zeros(5), 0.7), torch.ones(5, dtype=torch.float64))
    tiny = awq_scale(torch.tensor([1e-30, 1.0]), 1.0)  # clamped at 1e-4 before it is normalised
    assert torch.allclose(tiny, torch.tensor([1e-2, 1e2], dtype=torch.float64))


# --- the error that is searched -----------------------------------------------------------------


def slow_error(weight: Tensor, x: Tensor, scale: Tensor, scheme: Scheme) -> float:
    """Every token through the quantized linear, one by one."""
    spec = scheme.weight
    assert spec is not None
    size = spec.group_size_for(weight.shape[1])
    importance = x.square().mean(0) / scale.square()
    ratios = (1.0, 0.9, 0.8, 0.7)
    chosen = search_scale(weight * scale, size, spec, importance, ratios)
    groups = (weight * scale).reshape(len(weight), -1, size)
    stored = quantize_groups(groups, *chosen, spec).view(weight.shape)
    total = 0.0
    for token in x:
        difference = functional.linear(token / scale, stored) - functional.linear(token, weight)
        total += float(difference.double().square().sum())
    return total


def signal(weight: Tensor, x: Tensor) -> float:
    return float(functional.linear(x, weight).double().square().sum())


@pytest.mark.parametrize("tokens", [1, 40, 64, 65, 300])  # at most k: the tokens; above: moments
def test_the_error_is_that_of_all_tokens(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    values = [torch.randn(1, tokens, 64, generator=generator)]
    gm, _ = prepared(batches=(values[0],))
    linear, weight = linears(gm)[0], get_tensor(gm, "first.weight")
    seen = look_at(values, [linear], generator)
    assert (seen.moment is None) == (tokens <= 64)
    error = MatmulError(weight, linear, seen)
    for _ in range(3):
        scale = torch.rand(64, generator=generator) + 0.5
        slow = slow_error(weight, values[0][0], scale, scheme_of(linear))
        assert error(scale) == pytest.approx(slow, rel=1e-4)
    assert error.signal == pytest.approx(signal(weight, values[0][0]), rel=1e-4)


def test_the_search_finds_what_brute_force_finds() -> None:
    gm, ctx = prepared()
    before = clone(gm)
    row = table(Awq().run(gm, ctx))[0]
    x = torch.cat([next(iter(batch.values())) for batch in ctx.batches]).flatten(0, 1)
    y = functional.rms_norm(x, (64,), get_tensor(before, "norm.weight"), eps=1e-6)
    errors = []
    for step in range(20):
        scale = awq_scale(y.abs().mean(0), step / 20).float()
        relative = 0.0
        for node in linears(before):
            weight = get_tensor(before, str(node.args[1].target))
            noise = slow_error(weight, y, scale, scheme_of(node))
            relative += noise / signal(weight, y) / 2
        errors.append(relative)
    best = min(range(20), key=errors.__getitem__)
    assert row["power"] == best / 20 > 0
    decibels = [-10 * torch.tensor(errors[i]).log10().item() for i in (0, best)]
    assert [row["db_before"], row["db_after"]] == pytest.approx(decibels, abs=1e-2)
    scale = awq_scale(y.abs().mean(0), best / 20)
    for name, weight in weights_of(before).items():
        factor = {"norm.weight": 1 / scale, "first.bias": torch.ones(1)}.get(name, scale)
        expected = weight * factor
        assert torch.allclose(get_tensor(gm, name).double(), expected.double(), rtol=1e-5), name


def test_it_pays_where_inputs_have_outliers() -> None:
    """The error of the stored model falls, not only the one that was searched."""
    errors = []
    for step in ((), (Awq(),)):
        gm, ctx = prepared()
        inputs = ctx.batches[0]
        expected = run(gm, inputs)[0]
        for each in (*step, Calibrate(), InsertFakeQuant(), QuantizeWeights(clip_search=True)):
            each.run(gm, ctx)
        finish(gm)
        errors.append(float((run(gm, inputs)[0] - expected).square().mean()))
    assert errors[1] < 0.3 * errors[0]


# --- the function stays the same ----------------------------------------------------------------


@given(st.lists(st.floats(-6, 6), min_size=64, max_size=64))
@settings(max_examples=25, deadline=None)
def test_any_scale_folds_exactly(logs: list[float]) -> None:
    gm, ctx = prepared(NormLinear().double(), batches=(torch.randn(2, 5, 64).double(),))
    (site,), _ = find_scale_sites(gm, ctx.interface)
    expected = run(gm, ctx.batches[0])[0]
    factors: Factors = {}
    add_factors(site, 2 ** torch.tensor(logs, dtype=torch.float64), factors)
    fold(gm, ctx, factors, "awq")
    assert torch.allclose(run(gm, ctx.batches[0])[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_models_are_proved(family: str) -> None:
    gm, _ = canonical(family)
    record = run_passes(gm, family_context(family, 2, 16), "W3A16-g32", Awq())[-1]
    assert record.result.changed >= 4
    assert record.proved_difference is not None and record.proved_difference < 1e-5
    for row in table(record.result):
        assert row["db_after"] > row["db_before"] and row["power"] > 0


# --- what is left alone -------------------------------------------------------------------------


def test_float_linears_are_left_alone() -> None:
    gm, ctx = prepared(scheme="FLOAT")
    old = weights_of(gm)
    result = Awq().run(gm, ctx)
    assert result.changed == 0 and not result.sites and not result.tables
    assert all(old[name] is tensor for name, tensor in weights_of(gm).items())
    assert reason(result) == "first:linear is FLOAT: its weight is not quantized"
    assert "first:linear" in {skip.node for skip in result.skipped}  # nothing absorbs its output


def test_a_float_neighbour_is_no_hindrance() -> None:
    """A router that stays float beside quantized experts takes up the scale as well."""
    gm, ctx = prepared()
    annotate(linears(gm)[1], scheme=parse_scheme("FLOAT"))
    alone, _ = prepared()
    assert Awq().run(gm, ctx).changed == 1
    assert not torch.equal(get_tensor(gm, "second.weight"), get_tensor(alone, "second.weight"))


def test_a_site_that_no_power_helps_is_left_alone() -> None:
    """Weights that the grid holds exactly have no error to lower."""
    module = NormLinear()
    with torch.no_grad():
        for linear in (module.first, module.second):
            linear.weight.copy_(torch.randint(-7, 8, linear.weight.shape) / 8)
            linear.weight[:, ::32] = 7 / 8
    gm, ctx = prepared(module)
    old = weights_of(gm)
    result = Awq().run(gm, ctx)
    assert result.changed == 0
    assert reason(result) == "no power lowers the error of the matmuls behind it"
    assert all(old[name] is tensor for name, tensor in weights_of(gm).items())


def test_only_selected_kinds() -> None:
    gm, ctx = prepared()
    result = Awq(sites=("up_down",)).run(gm, ctx)
    assert result.changed == 0
    assert reason(result) == "sites of kind norm_linear are not selected"


# --- degenerate and bad input -------------------------------------------------------------------


def test_a_dead_channel_keeps_its_scale() -> None:
    module = NormLinear()
    with torch.no_grad():
        module.norm.weight[7] = 0.0
    gm, ctx = prepared(module)
    before = get_tensor(gm, "first.weight")[:, 7].clone()
    assert Awq().run(gm, ctx).changed == 1
    assert torch.equal(get_tensor(gm, "first.weight")[:, 7], before)


def test_one_token() -> None:
    gm, ctx = prepared(batches=(torch.randn(1, 1, 64),))
    expected = run(gm, ctx.batches[0])[0]
    Awq().run(gm, ctx)
    assert torch.allclose(run(gm, ctx.batches[0])[0], expected, rtol=1e-4, atol=1e-4)


def test_zero_weights() -> None:
    module = NormLinear()
    with torch.no_grad():
        module.first.weight.zero_()
        module.second.weight.zero_()
    gm, ctx = prepared(module)
    result = Awq().run(gm, ctx)
    assert result.changed == 0 and "no power" in reason(result)


def test_activations_that_are_not_finite() -> None:
    gm, ctx = prepared()
    next(iter(ctx.batches[1].values()))[0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match="norm:rms_norm"):
        Awq().run(gm, ctx)


def test_no_calibration_tokens() -> None:
    gm, ctx = prepared()
    with pytest.raises(InputError, match="no calibration tokens"):
        Awq().run(gm, replace(ctx, batches=()))


def test_wrong_options() -> None:
    with pytest.raises(RecipeError, match="did you mean norm_linear"):
        Awq(sites=("norm_linaer",))
    with pytest.raises(RecipeError, match="steps"):
        Awq(steps=0)


def test_the_same_bits_every_time() -> None:
    graphs = [prepared() for _ in range(2)]
    for gm, ctx in graphs:
        Awq().run(gm, ctx)
    for name, weight in weights_of(graphs[0][0]).items():
        assert torch.equal(weight, get_tensor(graphs[1][0], name)), name


@pytest.mark.parametrize("recipe", ["w4a16-awq", "w8a8"])
def test_a_float16_model_with_subnormal_weights_compiles(recipe: str) -> None:
    """Scales that are folded into such weights are rounded coarsely: no defect, and no zeros."""
    model = make_model("llama").half()
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            parameter.data.mul_(2e-6)
    compiled = panguq.compile(model, recipe, calibration=token_ids(2, 16))
    found = {row.name: row.local_sqnr_db for row in compiled.report.matmuls if "down" in row.name}
    assert len(found) >= 2 and all(db > 8 for db in found.values()), found
