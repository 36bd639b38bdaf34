"""A graph as text: readable, complete, and different wherever a weight differs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from panguq.ir.edit import get_tensor, set_tensor
from panguq.ir.text.printer import Hasher, content_hash, print_graph
from tests.model_shelf import trace_tiny


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.arange(8.0).view(2, 4) - 7)
            self.linear.bias.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * 1.5).relu()


def test_the_text() -> None:
    gm, _ = trace_tiny(Small(), torch.randn(3, 4))
    assert print_graph(gm) == (
        "%x : f32[x_0, 4] = input\n"
        "%linear.weight : f32[2, 4] = weight\n"
        "%linear.bias : f32[2] = weight\n"
        "%linear:linear : f32[x_0, 2] = aten.linear(%x, %linear.weight, %linear.bias)\n"
        "%mul : f32[x_0, 2] = aten.mul.Tensor(%linear:linear, 1.5)\n"
        "%relu : f32[x_0, 2] = aten.relu(%mul)\n"
        "return [%relu]\n"
    )


def test_weights_show_amax_and_a_short_hash() -> None:
    gm, _ = trace_tiny(Small(), torch.randn(3, 4))
    digest = content_hash(get_tensor(gm, "linear.weight"))
    line = print_graph(gm, Hasher()).splitlines()[1]
    assert line == f"%linear.weight : f32[2, 4] = weight amax=7 #{digest[:10]}"


def test_one_changed_value_changes_the_text() -> None:
    gm, _ = trace_tiny(Small(), torch.randn(3, 4))
    before = print_graph(gm, Hasher())
    changed = get_tensor(gm, "linear.weight").clone()
    changed[1, 2] += 1e-6
    set_tensor(gm, "linear.weight", changed)
    assert print_graph(gm, Hasher()) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(4), -torch.zeros(4)),
        (torch.ones(4), 2 * torch.ones(4)),
    ],
)
def test_hashes_tell_dtype_shape_and_bits_apart(one, other) -> None:
    assert content_hash(one) == content_hash(one.clone())
    assert content_hash(one) != content_hash(other)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(0), torch.tensor(True), torch.ones(3).bfloat16(), torch.ones(2, 3).t()]
)
def test_any_tensor_has_a_hash(tensor) -> None:
    assert content_hash(tensor) == content_hash(tensor.clone().contiguous())
    assert len(content_hash(tensor)) == 64
