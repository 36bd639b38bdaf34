"""Scales move together towards the float model's predictions, and nothing else moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from panguq.errors import InputError, NumericsError, RecipeError
from panguq.ir.edit import clone, get_tensor, set_tensor, weights_of
from panguq.ir.run.interpret import run
from panguq.ir.run.reverse_sweep import FirstOutput
from panguq.passes import tune_scales
from panguq.passes.billm import BiLlm
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import PassContext
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.tune_scales import TuneScales
from tests.model_shelf import (
    EXPERTS,
    TwoLinears,
    canonical,
    family_context,
    normal_weights,
    run_passes,
    tiny_context,
    trace_tiny,
)


def model() -> nn.Module:
    return normal_weights(TwoLinears(32, 64, 8, bias=False))


def quantized(family: str, scheme: str = "W3A16-g32") -> tuple[fx.GraphModule, PassContext]:
    """A fake-quant graph, and the context that knows the float graph."""
    gm, _ = canonical(family)
    ctx = replace(family_context(family), reference=clone(gm))
    run_passes(gm, ctx, scheme, InsertFakeQuant(), QuantizeWeights())
    return gm, ctx


def two(scheme: str = "W3A16-g32") -> tuple[fx.GraphModule, PassContext]:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(9, 32, generator=generator) for _ in range(3)]
    gm, interface = trace_tiny(model(), torch.randn(3, 32))
    ctx = replace(tiny_context(interface, *batches), reference=clone(gm))
    run_passes(gm, ctx, scheme, InsertFakeQuant(), QuantizeWeights())
    return gm, ctx


def mean_loss(gm: fx.GraphModule, ctx: PassContext) -> float:
    """The loss as its definition has it, in float64."""
    losses = []
    assert ctx.reference is not None
    for batch in ctx.batches:
        found, wanted = (run(graph, batch)[0].double() for graph in (gm, ctx.reference))
        if ctx.interface.kind == "causal_lm":
            p = wanted.log_softmax(-1)
            losses.append((p.exp() * (p - found.log_softmax(-1))).sum(-1).mean())
        else:
            losses.append((found - wanted).square().sum() / wanted.square().sum() / 2)
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("family", ["two", "llama", EXPERTS])
def test_the_gradient_is_that_of_the_loss(family: str) -> None:
    """Against finite differences of single groups' scales."""
    gm, ctx = two() if family == "two" else quantized(family, "W6A16-g32")
    for name, tensor in weights_of(gm).items():
        if name.endswith("_scale"):
            set_tensor(gm, name, tensor.float())  # bfloat16 has no small steps
    scales = tune_scales._tunable(gm, result := tune_scales.PassResult())
    assert not result.skipped
    loss = tune_scales._Loss(
        FirstOutput(ctx.reference, ctx.batches).of, ctx.interface.kind == "causal_lm"
    )
    loss.expect(range(len(ctx.batches)))
    tune_scales._add_gradients(gm, scales, list(ctx.batches), loss)
    assert loss.total / len(ctx.batches) == pytest.approx(mean_loss(gm, ctx), rel=1e-3)
    for scale in (scales[0], scales[-2], scales[-1]):  # in a mixture the second last is experts'
        place = torch.unravel_index(scale.gradient.abs().argmax(), scale.gradient.shape)
        ends = []
        for step in (-1e-2, 1e-2):
            moved = scale.start.clone()
            moved[place] *= torch.tensor(step).exp()
            set_tensor(gm, scale.name, moved)
            ends.append(mean_loss(gm, ctx))
        set_tensor(gm, scale.name, scale.start)
        slope = (ends[1] - ends[0]) / 2e-2
        assert float(scale.gradient[place]) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("family", ["two", "llama"])
@pytest.mark.parametrize("scheme", ["W3A16-g32", "W4A8_STATIC-g32"])
def test_the_model_comes_nearer_and_codes_stay(family: str, scheme: str) -> None:
    gm, _ = (trace_tiny(model(), torch.randn(3, 32))) if family == "two" else canonical(family)
    ctx = two()[1] if family == "two" else quantized(family)[1]
    run_passes(gm, ctx, scheme, Calibrate(), InsertFakeQuant(), QuantizeWeights())
    before, start = mean_loss(gm, ctx), dict(weights_of(gm))
    result = TuneScales(epochs=8, learning_rate=0.01).run(gm, ctx)
    assert mean_loss(gm, ctx) < before
    losses = [row[1] for row in result.tables["epochs"].rows]
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in weights_of(gm).items() if tensor is not start[name]}
    assert moved == {row[0] for row in result.tables["scales"].rows}
    assert all(name.endswith("weight_scale") for name in moved)
    assert len(moved) == result.changed


def test_two_runs_agree_and_a_run_goes_on() -> None:
    """The state of an epoch that was finished is all that the next one needs."""
    runs = []
    for _ in range(2):
        gm, ctx = two()
        TuneScales(epochs=3).run(gm, ctx)
        runs.append(gm)

    gm, ctx = two()
    finished = {}
    original = ctx.store.once

    def once(unit, compute):
        name = unit.rpartition("/")[2]
        finished[name] = finished.get(name) or original(unit, compute)
        return finished[name]

    ctx.store.once = once  # type: ignore[method-assign]
    TuneScales(epochs=3).run(gm, ctx)
    del finished["epoch 2"]
    again, other = two()
    other.store.once = once  # type: ignore[method-assign]
    TuneScales(epochs=3).run(again, other)
    for name, tensor in weights_of(gm).items():
        assert all(torch.equal(tensor, get_tensor(run, name)) for run in (*runs, again))


def test_a_16_bit_model_can_store_the_scales() -> None:
    gm, interface = trace_tiny(model().bfloat16(), torch.randn(3, 32).bfloat16())
    ctx = tiny_context(interface, torch.randn(9, 32).bfloat16())
    ctx = replace(ctx, reference=clone(gm))
    run_passes(gm, ctx, "W8A16", InsertFakeQuant(), QuantizeWeights())
    start = gm.first.weight_scale
    TuneScales(learning_rate=0.1).run(gm, ctx)
    scale = gm.first.weight_scale
    assert scale.dtype == start.dtype == torch.float32 and not torch.equal(scale, start)
    assert torch.equal(scale, scale.bfloat16().float())


def test_binary_weights_are_left_alone() -> None:
    gm, ctx = two()
    gm, _ = trace_tiny(model(), torch.randn(3, 32))
    run_passes(gm, ctx, "W1A16-g32", InsertFakeQuant(), BiLlm(block_size=32))
    result = TuneScales().run(gm, ctx)
    assert result.changed == 0 and len(result.skipped) == 2
    assert result.skipped[0].reason == "its weight has more than one kind of scale"


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"batch_sequences": 0}, {"learning_rate": 0.0}, {"learning_rate": 1}]
)
def test_options_out_of_range(options) -> None:
    with pytest.raises(RecipeError, match="tune-scales: "):
        TuneScales(**options)


def test_what_it_cannot_do_without() -> None:
    gm, ctx = two()
    with pytest.raises(InputError, match="no calibration data"):
        TuneScales().run(gm, replace(ctx, batches=[]))
    with pytest.raises(InputError, match="float model"):
        TuneScales().run(gm, replace(ctx, reference=None))


def test_a_gradient_that_overflows_is_an_error() -> None:
    gm, ctx = two()
    set_tensor(gm, "second.weight_scale", gm.second.weight_scale.float() * 1e30)
    with pytest.raises(NumericsError):
        TuneScales().run(gm, ctx)
