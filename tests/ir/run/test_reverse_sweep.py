"""Gradients that are found block by block are those of the whole model at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import NumericsError
from panguq.ir.analysis.blocks import blocks
from panguq.ir.edit import find_label, get_tensor
from panguq.ir.run.interpret import run, values
from panguq.ir.run.reverse_sweep import FirstOutput, reverse_sweep
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import PassContext, linears
from tests.model_shelf import (
    TwoLinears,
    canonical,
    family_context,
    run_passes,
    shared_model,
    tiny_context,
    trace_tiny,
)


def weight_gradients(
    gm: fx.GraphModule, ctx: PassContext, watch: list[fx.Node], order: list[str] | None = None
) -> dict[fx.Node, Tensor]:
    """Gradient of the sum over batches of (output · direction(output)), by linear `[n, k]`."""
    found: dict[fx.Node, Tensor] = {}

    def observe(seen: dict[fx.Node, tuple[Tensor, Tensor]]) -> None:
        for node, (x, at_output, *_) in seen.items():
            product = at_output.flatten(0, -2).T @ x.flatten(0, -2)
            found[node] = found.get(node, 0) + product

    done = (order if order is not None else []).append
    reverse_sweep(
        gm, ctx.batches, watch, direction, observe, lambda: done("block"), lambda *_: None
    )
    return found


def direction(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gradients_are_those_of_the_whole_model(family: str) -> None:
    gm, _ = canonical(family)
    ctx = family_context(family, sequences=2, tokens=9)
    finished: list[str] = []
    found = weight_gradients(gm, ctx, linears(gm), finished)
    model = shared_model(family)
    model.zero_grad()
    for batch in ctx.batches:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        (logits * direction(logits)).sum().backward()
    compared = 0
    for node in linears(gm):
        weight = dict(model.named_parameters()).get(str(node.args[1].target))
        if weight is None or "embed" in str(node.args[1].target):  # a tied weight has two readers
            continue
        torch.testing.assert_close(found[node], weight.grad, rtol=1e-3, atol=1e-4)
        compared += 1
    model.zero_grad()
    assert compared >= 8
    assert len(finished) >= 3  # it did go block by block


def test_only_what_is_watched_is_observed() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama", sequences=1, tokens=5)
    last = find_label(gm, "model.layers.1.mlp.down_proj:linear")
    order: list[str] = []
    assert set(weight_gradients(gm, ctx, [last], order)) == {last}
    assert order == ["block"]
    assert len(blocks(gm)) > 2


class Heads(nn.Module):
    """Two linears on the input itself; only the first reaches the first output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x) * 2.0, self.second(x)


def test_a_matmul_that_the_output_does_not_depend_on_is_never_observed() -> None:
    x = torch.randn(2, 5, 4)
    gm, interface = trace_tiny(Heads(), x)
    found = weight_gradients(gm, tiny_context(interface, x, x), linears(gm))
    (node,) = found
    expected = 2 * (2 * direction(torch.empty(2, 5, 3))).flatten(0, 1).T @ x.flatten(0, 1)
    torch.testing.assert_close(found[node], expected)


def test_what_is_not_finite_is_named() -> None:
    x = torch.randn(2, 5, 4)
    gm, interface = trace_tiny(Heads(), x)
    broken = tiny_context(interface, x * torch.inf)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        weight_gradients(gm, broken, linears(gm))
    get_tensor(gm, "first.weight")[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="NaN or Inf"):
        weight_gradients(gm, tiny_context(interface, x), linears(gm))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_a_rounded_activation_passes_its_gradient_on(scheme: str) -> None:
    x = torch.randn(5, 32)
    gm, interface = trace_tiny(TwoLinears(32, 32, 8, nn.Identity()), x)
    ctx = tiny_context(interface, x)
    run_passes(gm, ctx, scheme, Calibrate(), InsertFakeQuant())
    first, second = (find_label(gm, f"{name}:linear") for name in ("first", "second"))
    gradients: dict[fx.Node, Tensor] = {}
    inputs: dict[fx.Node, Tensor] = {}

    def observe(seen: dict[fx.Node, tuple[Tensor, Tensor]]) -> None:
        for node, (value, gradient, *_) in seen.items():
            inputs[node], gradients[node] = value, gradient

    watch = [first, second]
    reverse_sweep(gm, ctx.batches, watch, direction, observe, lambda: None, lambda *_: None)
    weights = values(gm, ctx.batches[0], [second.args[1], second.args[0]])
    torch.testing.assert_close(gradients[first], gradients[second] @ weights[second.args[1]])
    assert torch.equal(inputs[second], weights[second.args[0]])  # the value is the rounded one


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_first_output_is_kept_by_its_last_block(family: str) -> None:
    gm, _ = canonical(family)
    ctx = family_context(family, sequences=3, tokens=7)
    outputs = FirstOutput(gm, ctx.batches)
    for index in (2, 0, 2):
        expected = run(gm, ctx.batches[index])[0]
        torch.testing.assert_close(outputs.of(index), expected, rtol=1e-4, atol=1e-5)
