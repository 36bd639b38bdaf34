"""Tokens count by how much the model's predictions depend on them."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import InputError, RecipeError
from panguq.ir.edit import clone, label
from panguq.ir.interface import Interface
from panguq.ir.node_meta import meta_of
from panguq.ir.views import ExpertLinear
from panguq.passes.gptq import Gptq
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import linears
from panguq.passes.slim_llm import SlimLlm
from panguq.passes.weigh_tokens import WeighTokens
from tests.model_shelf import (
    TwoLinears,
    canonical,
    family_context,
    normal_weights,
    run_passes,
    tiny_context,
    trace_tiny,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two() -> nn.Module:
    return normal_weights(TwoLinears(32, 32, 8, nn.Identity(), bias=False))


SCHEME = "W4A16-g32"


def batches(scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 32, generator=generator) * scale for _ in range(2)]


def weights_by_label(power: float = 1.0) -> dict[str, tuple[Tensor, ...]]:
    gm, interface = trace_tiny(two(), torch.randn(3, 32))
    run_passes(gm, tiny_context(interface, *batches()), SCHEME, WeighTokens(power=power))
    return {label(node): meta_of(node).token_weights for node in linears(gm)}


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_weights_are_the_squared_gradients(power) -> None:
    """A module's labels are Gaussian noise around its outputs: their gradient is the noise."""
    noise = [torch.randn(40, 8, generator=seeded(number)) for number in range(2)]
    at_first = [n @ two().second.weight.detach() for n in noise]
    found = weights_by_label(power)
    for name, gradients in (("second:linear", noise), ("first:linear", at_first)):
        squares = torch.cat(gradients).square().mean(1) ** power
        expected = squares / squares.mean()
        torch.testing.assert_close(torch.cat(found[name]), expected, rtol=1e-5, atol=1e-6)


def test_gptq_counts_tokens_by_their_weights() -> None:
    """The same codes as for inputs that are scaled by the root of the weights beforehand."""
    x = batches()
    weights = weights_by_label()["first:linear"]
    scaled = [batch * weight.sqrt()[:, None] for batch, weight in zip(x, weights, strict=True)]

    def first_codes(data: list[Tensor], *steps: WeighTokens) -> Tensor:
        gm, interface = trace_tiny(two(), torch.randn(3, 32))
        context = tiny_context(interface, *data)
        run_passes(gm, context, SCHEME, *steps, InsertFakeQuant(), Gptq())
        return gm.first.weight_codes

    weighed = first_codes(x, WeighTokens())
    assert torch.equal(weighed, first_codes(scaled))
    assert not torch.equal(weighed, first_codes(x))


def test_groups_of_outputs_have_weights_and_hessians_of_their_own() -> None:
    """Each run of rows has the codes of a matmul that has these rows alone."""
    gm, interface = trace_tiny(two(), torch.randn(3, 32))
    weighed = (WeighTokens(groups=3), InsertFakeQuant(), Gptq())
    run_passes(gm, tiny_context(interface, *batches()), SCHEME, *weighed)
    noise = [torch.randn(40, 8, generator=seeded(number)) for number in range(2)]
    weight = two().second.weight.detach()
    first, interface = trace_tiny(two(), torch.randn(3, 32))
    context = tiny_context(interface, *batches())
    run_passes(first, context, SCHEME, WeighTokens(groups=3))
    found = {label(node): meta_of(node).token_weights for node in linears(first)}
    for name, gradients in (
        ("second:linear", noise),
        ("first:linear", [n @ weight for n in noise]),
    ):
        n = gradients[0].shape[1]
        ends = [n * number // 3 for number in range(4)]
        for group, (start, stop) in enumerate(itertools.pairwise(ends)):
            squares = torch.cat(gradients)[:, start:stop].square().mean(1)
            row = torch.cat([batch[group] for batch in found[name]])
            torch.testing.assert_close(row, squares / squares.mean(), rtol=1e-5, atol=1e-6)
    tokens = found["first:linear"]
    for group, (start, stop) in enumerate(((0, 10), (10, 21), (21, 32))):
        alone = nn.Linear(32, stop - start, bias=False)
        with torch.no_grad():
            alone.weight.copy_(two().first.weight[start:stop])
        rows, of_rows = trace_tiny(alone, torch.randn(3, 32))
        scaled = [x * w[group].sqrt()[:, None] for x, w in zip(batches(), tokens, strict=True)]
        run_passes(rows, tiny_context(of_rows, *scaled), SCHEME, InsertFakeQuant(), Gptq())
        packed = gm.first.weight_codes[start:stop]
        assert torch.equal(packed, rows.weight_codes)


def test_solvers_whose_rows_share_something_refuse_groups() -> None:
    recipe = (WeighTokens(groups=2), InsertFakeQuant(), SlimLlm())
    with pytest.raises(RecipeError, match="slim-llm solves all outputs of a matmul together"):
        recipe[-1].needs(recipe[:-1])


@functools.cache
def routed_graph() -> tuple[fx.GraphModule, Interface]:
    """Three experts: a token's first number says to which two it goes, two others the shares."""
    ops = torch.ops.panguq

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 8, 32, generator=seeded(3)))

        def forward(self, x: Tensor) -> Tensor:
            first = (x[:, 0] > 0).to(torch.int64)
            ids = torch.stack([first, first + 1], dim=1)
            order, counts = ops.route_tokens(ids, 3)
            rows = ops.expert_linear(ops.permute_tokens(x, order, 2), self.experts, None, counts)
            shares = torch.stack([x[:, 1], x[:, 2]], dim=1).sigmoid()
            return ops.combine_experts(rows, order, shares)

    return trace_tiny(Routed(), torch.randn(3, 32))


def test_weights_follow_tokens_to_experts() -> None:
    """A row's gradient is the noise at its token's output times the share that it has there."""
    found, interface = routed_graph()
    gm = clone(found)
    run_passes(gm, tiny_context(interface, *batches()), SCHEME, WeighTokens())
    (node,) = (n for n in gm.graph.nodes if ExpertLinear.match(n) is not None)
    squares = [
        torch.randn(40, 8, generator=seeded(number)).square().sum(1)
        * x[:, 1:3].sigmoid().square().sum(1)
        for number, x in enumerate(batches())
    ]
    found = torch.cat(meta_of(node).token_weights)
    expected = torch.cat(squares) / torch.cat(squares).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("least", [0, 1000])
def test_experts_count_tokens_by_their_weights(least: int) -> None:
    """Those that a router sends them, or all of them: the codes of inputs scaled beforehand, which
    the router sends to the same experts."""
    x = batches()
    gm, interface = routed_graph()
    weighed_by = WeighTokens()

    def codes(data: list[Tensor], *steps: WeighTokens) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        graph = clone(gm)
        context = tiny_context(interface, *data)
        run_passes(graph, context, SCHEME, *steps, InsertFakeQuant(), Gptq(least_tokens=least))
        (node,) = (n for n in graph.graph.nodes if ExpertLinear.match(n) is not None)
        return graph.experts_codes, meta_of(node).token_weights

    weighed, weights = codes(x, weighed_by)
    assert weights is not None
    scaled = [batch * weight.sqrt()[:, None] for batch, weight in zip(x, weights, strict=True)]
    assert torch.equal(weighed, codes(scaled)[0])
    assert not torch.equal(weighed, codes(x)[0])


def test_siblings_share_weights_and_runs_agree() -> None:
    found = []
    for _ in range(2):
        gm, _ = canonical("llama")
        context = family_context("llama")
        run_passes(gm, context, SCHEME, WeighTokens())
        found.append({label(n): meta_of(n).token_weights for n in linears(gm)})
    one, other = found
    quantized = [name for name, weights in one.items() if weights is not None]
    assert len(quantized) == 15  # the head, too
    for name in quantized:
        assert len(one[name]) == len(context.batches)
        assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))
        every = torch.cat(one[name])
        assert float(every.mean()) == pytest.approx(1.0, rel=1e-5) and float(every.min()) >= 0.0
    q, k = (one[f"model.layers.0.self_attn.{name}_proj:linear"] for name in ("q", "k"))
    assert q is k


def test_what_stays_float_needs_no_weights() -> None:
    gm, interface = trace_tiny(two(), torch.randn(3, 32))
    record = run_passes(gm, tiny_context(interface), "FLOAT", WeighTokens())[-1]
    assert record.result.changed == 0


def test_without_data_and_with_a_wrong_power() -> None:
    gm, interface = trace_tiny(two(), torch.randn(3, 32))
    with pytest.raises(InputError, match="no calibration data"):
        run_passes(gm, tiny_context(interface), SCHEME, WeighTokens())
    with pytest.raises(RecipeError, match=r"power 0 must lie in \(0, 1\]"):
        WeighTokens(power=0)
