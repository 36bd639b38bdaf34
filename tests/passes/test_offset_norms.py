"""Norms whose gain is 1 + w, as Gemma and Nemotron store them: scales and rotations keep the form.

A server adds the 1 itself, so what is stored must stay w.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from panguq.ir.analysis.channels import find_scale_sites
from panguq.ir.edit import get_tensor, label, weights_of
from panguq.ir.run.interpret import run
from panguq.passes.awq import Awq
from panguq.passes.rotate import Rotate
from panguq.passes.scaling.folding import storable_factors
from panguq.passes.smoothquant import SmoothQuant
from tests.model_shelf import run_passes, tiny_context, trace_tiny

K = 16
PAIRS = {"norm": "up", "last_norm": "head"}


class GemmaNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(K))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normalized * (1.0 + self.weight.float())).type_as(x)


class NemotronNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(K))
        self.bias = nn.Parameter(0.1 * torch.randn(K))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (K,), self.weight + 1.0, self.bias, 1e-5)


class Block(nn.Module):
    """x + down(relu(up(norm(x)))), behind an embedding; the stream's end is normalized, too."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, K)
        self.norm, self.last_norm = norm(), norm()
        self.up, self.down = nn.Linear(K, 2 * K, bias=False), nn.Linear(2 * K, K, bias=False)
        self.head = nn.Linear(K, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return self.head(self.last_norm(x))


def block(norm: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Block(norm).to(dtype)


IDS = torch.arange(2, 26).view(2, 12)


@pytest.mark.parametrize("step", [SmoothQuant(alpha=0.9), Awq()], ids=lambda step: step.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [GemmaNorm, NemotronNorm])
def test_scales_move_and_w_stays_w(norm, dtype, step) -> None:
    gm, interface = trace_tiny(block(norm, dtype), IDS)
    old = {name: tensor.clone() for name, tensor in weights_of(gm).items()}
    (before,) = run(gm, {interface.inputs[0]: IDS})
    scheme = "W8A16" if step.name == "awq" else "W8A8"
    record = run_passes(gm, tiny_context(interface, IDS), scheme, step)[-1]
    assert "norm_linear" in [row[1] for row in record.result.tables["scales"].rows]
    new = weights_of(gm)
    assert not all(torch.equal(old[f"{n}.weight"], new[f"{n}.weight"]) for n in PAIRS)
    for norm_name, linear in PAIRS.items():
        scale = new[f"{linear}.weight"].double() / old[f"{linear}.weight"].double()
        gains = [1 + w[f"{norm_name}.weight"].double() for w in (old, new)]
        moved = gains[1] * scale.mean(0) / gains[0]
        torch.testing.assert_close(moved, torch.ones(K).double(), rtol=8e-3, atol=0)
    (after,) = run(gm, {interface.inputs[0]: IDS})
    rounding = 4 * torch.finfo(dtype).eps
    assert (before - after).abs().max() <= rounding * before.abs().max()


def test_a_scale_is_one_that_the_norm_can_store() -> None:
    """Gains of a hundredth lie between bfloat16's numbers near -1: w moves, and s with it."""
    gm, interface = trace_tiny(block(GemmaNorm, torch.bfloat16), IDS)
    sites, _ = find_scale_sites(gm, interface)
    site = next(site for site in sites if label(site.source) == "norm:rms_norm")
    weight = get_tensor(gm, "norm.weight")
    weight[0] = -1.0  # a channel that is switched off
    gain = weight.double() + 1
    wanted = torch.full((K,), 123.0, dtype=torch.float64)
    wanted[1] = 1e9  # would be stored as -1: nothing of the channel would be left
    scale = storable_factors(gm, site, wanted)
    stored = (gain / scale - 1).to(torch.bfloat16).double()
    assert torch.equal(stored[1:] + 1, (gain / scale)[1:].to(torch.float64))
    assert scale[0] == 123 and scale[1] == 1
    assert (scale[2:] != 123).any() and ((scale[2:] / 123).log2().abs() < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotated_stream_leaves_a_gain_of_1(dtype) -> None:
    gm, interface = trace_tiny(block(GemmaNorm, dtype), IDS)
    (before,) = run(gm, {interface.inputs[0]: IDS})
    record = run_passes(gm, tiny_context(interface, IDS), "W4A4", Rotate())[-1]
    assert [row[1] for row in record.result.tables["rotations"].rows] == ["residual"]
    assert not get_tensor(gm, "norm.weight").any() and not get_tensor(gm, "last_norm.weight").any()
    (after,) = run(gm, {interface.inputs[0]: IDS})
    assert (before - after).abs().max() <= 8 * torch.finfo(dtype).eps * before.abs().max()


def test_layer_norms_keep_the_stream_as_it_is() -> None:
    gm, interface = trace_tiny(block(NemotronNorm, torch.float32), IDS)
    record = run_passes(gm, tiny_context(interface, IDS), "W4A4", Rotate())[-1]
    assert record.result.changed == 0
    assert any("subtracts the mean" in skip.reason for skip in record.result.skipped)


def test_a_norm_without_a_weight_is_no_site_and_says_so() -> None:
    module = nn.Sequential(nn.LayerNorm(K, elementwise_affine=False), nn.Linear(K, 4), nn.ReLU())
    gm, interface = trace_tiny(module, torch.randn(3, K))
    sites, blocked = find_scale_sites(gm, interface)
    assert not sites
    assert any("has no stored weight to scale" in item.reason for item in blocked)
