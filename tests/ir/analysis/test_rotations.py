"""Where rotations move, found by data flow: the stream, the values, and what stops them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from panguq.ir.analysis.rotations import RotationSite, find_rotation_sites
from panguq.ir.analysis.walk import Blocked
from panguq.ir.edit import label
from tests.model_shelf import canonical, hand_written, trace_tiny

SIZE = 8


class Stream(nn.Module):
    """x ─► first ─┬─► norm ─► second ─► add ─► last_norm ─► head, with a hook in between."""

    def __init__(self, hook: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, SIZE)
        self.norm = nn.RMSNorm(SIZE, eps=1e-6)
        self.second = nn.Linear(SIZE, SIZE)
        self.last_norm = nn.RMSNorm(SIZE, eps=1e-6)
        self.head = nn.Linear(SIZE, 5)
        self.gains = nn.Parameter(torch.rand(SIZE))
        self.table = nn.Parameter(torch.rand(3, SIZE))
        self.hook = hook or (lambda module, stream, normed: stream + module.second(normed))

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        stream = self.hook(self, stream, self.norm(stream))
        return self.head(self.last_norm(stream))


def found(module: nn.Module, *shape: int) -> tuple[list[RotationSite], list[Blocked]]:
    return find_rotation_sites(*trace_tiny(module, torch.randn(*(shape or (2, 3, 6)))))


def turns(site: RotationSite) -> dict[tuple[str, int], str]:
    """(weight, axis) of each turn, with the norm whose weight is folded."""
    return {(t.weight, t.axis): label(t.norm) if t.norm else "" for t in site.turns}


def test_a_stream_by_hand() -> None:
    (site,), immovable = found(Stream())
    assert not immovable
    assert (site.kind, label(site.source), site.block) == ("residual", "first:linear", SIZE)
    assert turns(site) == {
        ("first.weight", 0): "",
        ("first.bias", 0): "",
        ("second.weight", 0): "",
        ("second.weight", 1): "norm:rms_norm",
        ("second.bias", 0): "",
        ("head.weight", 1): "last_norm:rms_norm",
    }
    assert [label(n) for n in site.norms] == ["norm:rms_norm", "last_norm:rms_norm"]
    assert [label(n) for n in site.values] == [
        "first:linear", "norm:rms_norm", "second:linear", "add", "last_norm:rms_norm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "hook",
    [
        lambda m, stream, normed: stream * 0.5 + m.second(normed) / 3.0,
        lambda m, stream, normed: (stream - m.second(normed)).reshape(-1, 1, SIZE),
        lambda m, stream, normed: stream + m.second(normed) + m.table,
        lambda m, stream, normed: torch.cat([stream, m.second(normed[:, 1:])], 1),
        lambda m, stream, normed: (stream + m.second(normed)).transpose(0, 1)[:, [1, 0]],
        lambda m, stream, normed: stream * m.table[:, :1] + m.second(normed),
        lambda m, stream, normed: stream + m.second(m.norm(stream)) + m.second(normed),
    ],
    ids=["scalars", "reshape", "table", "cat", "positions", "per token", "shared modules"],
)
def test_what_a_stream_may_pass(hook: Callable[..., Tensor]) -> None:
    sites, immovable = found(Stream(hook), 3, 3, 6)
    assert len(sites) == 1 and not immovable, [item.reason for item in immovable]


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (lambda m, s, n: s + m.second(functional.relu(n)), "norm is read by relu, which mixes"),
        (lambda m, s, n: s + n, "cannot take up"),
        (lambda m, s, n: s * m.gains + m.second(n), "multiplies each channel by a number of its"),
        (lambda m, s, n: s / m.gains + m.second(n), "divides each channel by a number of its own"),
        (lambda m, s, n: s * m.second(n), "multiplies each channel by a number of its own"),
        (lambda m, s, n: s + m.second(n) + 1.0, "adds a constant to every channel"),
        (lambda m, s, n: s + m.second(n).mean(-1, True), "to every channel"),
        (lambda m, s, n: (s + m.second(n)).view(-1, 4, 2).flatten(1), "mixes the channels"),
        (lambda m, s, n: (s + m.second(n)).flip(-1), "flip"),
        (lambda m, s, n: s + functional.linear(n, m.second.weight * 2), "weight that is not stor"),
        (lambda m, s, n: torch.cat([s[..., :4], m.second(n)[..., 4:]], -1), "slice takes a part"),
        (lambda m, s, n: s + m.second(functional.layer_norm(s, (SIZE,))), "subtracts the mean"),
    ],
    ids=["relu of a norm", "norm into the stream", "gains", "quotient", "product", "constant",
         "mean", "reshape", "flip", "computed weight", "cat", "layer norm"],
)  # fmt: skip
def test_what_stops_a_stream(hook: Callable[..., Tensor], reason: str) -> None:
    sites, immovable = found(Stream(hook))
    assert not sites
    assert any(reason in item.reason for item in immovable), [i.reason for i in immovable]


class Returned(Stream):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        stream = self.first(x)
        return self.head(self.last_norm(stream)), stream


class Given(Stream):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last_norm(x))


def test_inputs_and_outputs_of_the_graph_stay_as_they_are() -> None:
    sites, immovable = found(Returned())
    assert not sites
    assert immovable[0].reason == "first:linear is an output of the graph"
    sites, immovable = found(Given(), 2, 3, SIZE)
    assert not sites
    assert immovable[0].reason == "x is an input of the graph"


class NormOfHeads(Stream):
    """As models with q_norm and k_norm have it."""

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x).unflatten(-1, (2, 4))
        normed = functional.rms_norm(heads, (4,), self.gains[:4]).flatten(-2)
        return self.head(functional.gelu(normed))


def test_a_norm_within_heads_is_no_stream() -> None:
    sites, _ = found(NormOfHeads())
    assert not sites


@pytest.mark.parametrize("family", ["llama", "qwen2", "openpangu"])
def test_decoders(family: str) -> None:
    sites, immovable = find_rotation_sites(*canonical(family))
    assert not immovable
    assert [(s.kind, s.block) for s in sites] == [("residual", 64), ("value", 16), ("value", 16)]
    stream = sites[0]
    assert len(stream.norms) == 5 and len(stream.readers) == 11  # 2 (q, k, v, gate, up), lm_head
    assert label(sites[1].source) == "model.layers.0.self_attn.v_proj:linear"
    assert [label(r) for r in sites[1].readers] == ["model.layers.0.self_attn.o_proj:linear"]
    cached = [n.target for n in sites[1].values if n.op == "placeholder"]
    assert cached == ["past_value_0"]


def test_grouped_heads_and_a_fused_projection() -> None:
    """GPT-2 makes q, k and v in one matmul: only the rows of v are rotated."""
    sites, immovable = find_rotation_sites(*canonical("gpt2"))
    assert [s.kind for s in sites] == ["value", "value"]
    rows = {(t.axis, t.start, t.stop) for t in sites[0].turns if "c_attn" in t.weight}
    assert rows == {(0, 128, 192)}
    assert all("subtracts the mean" in item.reason for item in immovable)
    assert {label(item.node) for item in immovable} >= {"transformer.ln_f:layer_norm"}


def test_a_model_that_owes_nothing_to_transformers() -> None:
    """Its stream has layer norms; its values are taken out of one matmul by a permutation."""
    ids = torch.zeros(2, 5, dtype=torch.long)
    sites, immovable = find_rotation_sites(*trace_tiny(hand_written(), ids))
    assert not sites
    assert any("subtracts the mean" in item.reason for item in immovable)
    assert any("permute moves the channels" in item.reason or "part" in item.reason
               for item in immovable)  # fmt: skip


class SharedWeight(Stream):
    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        square = functional.linear(self.norm(stream), self.second.weight, self.second.weight[0])
        return self.head(self.last_norm(stream + square))


def test_a_bias_that_is_computed() -> None:
    sites, immovable = found(SharedWeight())
    assert not sites
    assert "bias that is not stored" in immovable[0].reason
