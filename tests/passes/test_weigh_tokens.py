"""Tokens count by how much the model's predictions depend on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from panguq.errors import InputError, RecipeError
from panguq.ir.edit import label
from panguq.ir.node_meta import meta_of
from panguq.passes.gptq import Gptq
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import linears
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
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(40, 8, generator=generator) for _ in range(2)]
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
