"""Tokens go to their experts and come back: gating, routing and combining, by their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panguq.kernels.ascend.vendor.dynamic_quant import npu_dynamic_quant
from panguq.kernels.ascend.vendor.moe_combine import (
    npu_moe_finalize_routing,
    npu_moe_token_unpermute,
)
from panguq.kernels.ascend.vendor.moe_gating import (
    npu_moe_gating_top_k,
    npu_moe_gating_top_k_softmax,
)
from panguq.kernels.ascend.vendor.moe_routing import npu_moe_init_routing_v2

SEEDS = st.integers(0, 2**16)


def choices(generator: torch.Generator, tokens: int, k: int, experts: int) -> Tensor:
    """Each token's k different experts."""
    ranked = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    return ranked[:, :k].to(torch.int32)


def route(x: Tensor, ids: Tensor, experts: int, **rest: int) -> tuple[Tensor, ...]:
    how = {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True, **rest}
    return npu_moe_init_routing_v2(x, ids, expert_num=experts, **how)


def test_softmax_comes_before_the_choice_and_is_not_normalized() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]])
    weights, experts, rows = npu_moe_gating_top_k_softmax(logits, k=2)
    assert experts.tolist() == [[1, 2], [0, 1]]  # of equals the first
    assert torch.equal(weights, logits.softmax(-1).gather(1, experts.long()))
    assert rows.tolist() == [[0, 2], [1, 3]]
    done = torch.tensor([False, True])
    assert npu_moe_gating_top_k_softmax(logits, done, 2)[1].tolist() == [[1, 2], [3, 3]]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits, bias = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([9.0, 0.0, 0.0])
    weights, experts, scores = npu_moe_gating_top_k(
        logits, 2, bias=bias, norm_type=1, out_flag=True, routed_scaling_factor=2.5
    )
    assert experts.tolist() == [[0, 2]]
    chosen = logits.sigmoid()[:, [0, 2]]
    assert torch.allclose(weights, 2.5 * chosen / chosen.sum())
    assert torch.equal(scores, logits.sigmoid())
    unbiased, _, nothing = npu_moe_gating_top_k(logits, 1)
    assert torch.equal(unbiased, logits.softmax(-1)[:, 2:])  # softmax is not normalized
    assert nothing.isnan().all()


@pytest.mark.parametrize(("mode", "expected"), [(0, [0]), (1, [3])])
def test_experts_of_the_best_groups_alone_are_chosen(mode: int, expected: list[int]) -> None:
    """Group 0 has the largest score, group 1 the largest sum of two."""
    logits = torch.tensor([[3.0, -9.0, -9.0, 2.5, 2.4, -9.0]])
    _, experts, _ = npu_moe_gating_top_k(
        logits, 1, k_group=1, group_count=2, group_select_mode=mode, norm_type=1
    )
    assert experts.tolist() == [expected]


@given(tokens=st.integers(1, 9), k=st.integers(1, 3), seed=SEEDS)
def test_rows_are_sorted_by_expert_and_found_again(tokens: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, ids = torch.randn(tokens, 4, generator=generator), choices(generator, tokens, k, 5)
    rows, places, counts, _ = route(x, ids, 5)
    assert counts.tolist() == ids.flatten().bincount(minlength=5).tolist()
    assert torch.equal(rows[places.long()], x.repeat_interleave(k, 0))
    owners = torch.empty(tokens * k, dtype=torch.int32)
    owners[places.long()] = ids.flatten()
    assert torch.equal(owners, owners.sort().values)
    back = route(x, ids, 5, row_idx_type=1)[1]
    assert torch.equal(rows, x[back.long() // k])
    assert torch.equal(route(x, ids, 5, expert_tokens_num_type=0)[2], counts.cumsum(0))
    pairs = route(x, ids, 5, expert_tokens_num_type=2)[2]
    assert [tuple(pair) for pair in pairs.tolist() if pair[1]] == [
        (expert, count) for expert, count in enumerate(counts.tolist()) if count
    ]


def test_experts_of_other_devices_get_no_row() -> None:
    x = torch.arange(6.0).view(3, 2)
    ids = torch.tensor([[0, 2], [1, 2], [3, 0]], dtype=torch.int32)
    rows, places, counts, scale = npu_moe_init_routing_v2(
        x, ids, expert_num=4, active_expert_range=[1, 3], scale=torch.arange(3.0),
        expert_tokens_num_type=1, expert_tokens_num_flag=True,
    )  # fmt: skip
    assert counts.tolist() == [1, 2]
    assert rows[:3].tolist() == [[2, 3], [0, 1], [2, 3]]
    assert scale[:3].tolist() == [1, 0, 1]
    assert rows[3:].isnan().all() and scale[3:].isnan().all()
    assert places.tolist() == [-1, 1, 0, 2, -1, -1]


def test_codes_made_before_routing_are_those_made_in_it_but_for_halves() -> None:
    """Codes per token do not know the order of tokens; only the rounding of the ops differs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator).to(torch.bfloat16)
    ids = choices(generator, 512, 2, 8)
    codes, scale = npu_dynamic_quant(x)
    before = npu_moe_init_routing_v2(codes, ids, scale=scale, expert_num=8)
    inside = npu_moe_init_routing_v2(x, ids, expert_num=8, quant_mode=1)
    assert torch.equal(before[1], inside[1])
    assert torch.allclose(before[3], inside[3], rtol=1e-6)
    apart = (before[0].int() - inside[0].int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-3


def test_routing_rounds_half_away_and_takes_a_row_of_zeros() -> None:
    x = torch.tensor([[127.0, 2.5, -2.5, 0.49999], [0.0, 0.0, 0.0, 0.0]])
    ids = torch.tensor([[0], [1]], dtype=torch.int32)
    rows, _, _, scale = npu_moe_init_routing_v2(x, ids, expert_num=2, quant_mode=1)
    assert rows.tolist() == [[127, 3, -3, 0], [0, 0, 0, 0]]
    assert scale.tolist() == [1, 0]
    smooth = torch.tensor([[1.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    rows = npu_moe_init_routing_v2(x, ids, scale=smooth, expert_num=2, quant_mode=1)[0]
    assert rows[0].tolist() == [127, 5, -5, 0]


@given(
    tokens=st.integers(1, 9),
    k=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=SEEDS,
)
@settings(max_examples=30)
def test_what_was_routed_is_combined(tokens: int, k: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, ids = torch.randn(tokens, 8, generator=generator), choices(generator, tokens, k, 5)
    weights = torch.rand(tokens, k, generator=generator).to(dtype)
    rows, places, _, _ = route(x.to(dtype), ids, 5)
    exact = x.to(dtype).double() * weights.double().sum(1, keepdim=True)
    alone = npu_moe_token_unpermute(rows, places, weights)
    added = npu_moe_finalize_routing(
        rows, x.to(dtype), None, None, weights, places, None, drop_pad_mode=2
    )
    step = torch.finfo(dtype).eps
    bound = 4 * step * (1 + exact.abs())
    assert ((alone.double() - exact).abs() <= bound).all()
    assert ((added.double() - exact - x.to(dtype).double()).abs() <= 2 * bound + 2 * step).all()


def test_float16_is_added_up_in_float16_by_finalize_routing_alone() -> None:
    """2048 + 1 is 2048 in float16, three times; in float32 the sum is 2051."""
    rows = torch.tensor([[2048.0], [1.0], [1.0], [1.0]], dtype=torch.float16)
    places, weights = torch.arange(4, dtype=torch.int32), torch.ones(1, 4, dtype=torch.float16)
    finalized = npu_moe_finalize_routing(rows, None, None, None, weights, places, None, 2)
    assert finalized.item() == 2048
    assert npu_moe_token_unpermute(rows, places, weights).item() == 2052  # 2051, rounded once


def test_columns_are_the_order_of_the_first_routing_op() -> None:
    rows = torch.arange(4.0).view(4, 1)
    by_row = torch.tensor([0, 2, 1, 3], dtype=torch.int32)  # tokens 2, choices 2
    by_column = by_row.view(2, 2).t().reshape(-1)
    weights = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    first = npu_moe_finalize_routing(rows, None, None, None, weights, by_row, None, 2)
    second = npu_moe_finalize_routing(rows, None, None, None, weights, by_column, None, 0)
    assert first.flatten().tolist() == second.flatten().tolist() == [20, 3100]
