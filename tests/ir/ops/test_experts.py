"""Tokens sorted by expert, the matmul of all experts, and the weighted sums that come back."""

from __future__ import annotations

import pytest
import torch

from panguq.errors import InputError
from panguq.ir.ops.experts import combine_experts, expert_linear, permute_tokens, route_tokens

IDS = torch.tensor([[2, 0], [2, 3], [0, 2]])  # nobody goes to expert 1


def test_rows_are_sorted_by_expert_and_stay_in_order_within_one() -> None:
    order, counts = route_tokens(IDS, 4)
    assert order.tolist() == [1, 4, 0, 2, 5, 3]
    assert counts.tolist() == [2, 0, 3, 1]
    x = torch.arange(3.0)[:, None]
    assert permute_tokens(x, order, 2)[:, 0].tolist() == [0, 2, 0, 1, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_four_ops_are_a_mixture_of_experts(dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, dtype=dtype) for s in ((3, 5), (4, 7, 5), (4, 7)))
    shares = torch.rand(3, 2)
    order, counts = route_tokens(IDS, 4)
    rows = expert_linear(permute_tokens(x, order, 2), weight, bias, counts)
    y = combine_experts(rows, order, shares)
    every = torch.einsum("tk,enk->ten", x.double(), weight.double()) + bias.double()
    expected = (every[torch.arange(3)[:, None], IDS] * shares.double()[..., None]).sum(1)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_weights_of_experts_without_rows_are_not_read() -> None:
    weight = torch.ones(4, 7, 5)
    weight[1] = torch.nan
    order, counts = route_tokens(IDS, 4)
    rows = expert_linear(permute_tokens(torch.ones(3, 5), order, 2), weight, None, counts)
    assert rows.isfinite().all()


def test_no_token_at_all() -> None:
    order, counts = route_tokens(IDS[:0], 4)
    rows = expert_linear(torch.ones(0, 5), torch.ones(4, 7, 5), None, counts)
    assert combine_experts(rows, order, torch.ones(0, 2)).shape == (0, 7)


def test_an_id_that_is_no_expert() -> None:
    with pytest.raises(InputError, match="routed to expert 3 of 3"):
        route_tokens(IDS, 3)
