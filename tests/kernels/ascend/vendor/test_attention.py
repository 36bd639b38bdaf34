"""Attention, rotary embedding and swiglu against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from panguq.kernels.ascend.vendor.attention import npu_fused_infer_attention_score
from panguq.kernels.ascend.vendor.rotary_mul import npu_rotary_mul
from panguq.kernels.ascend.vendor.swiglu import npu_swiglu
from tests.kernels.ascend.rounding import EPSILON, half_unit
from tests.kernels.conftest import AssertClose

DTYPES = st.sampled_from(list(EPSILON))
HALVES = st.sampled_from([torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**16)


def reference(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """softmax(q @ k.T / 4 without what is hidden) @ v in float64, heads repeated."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, dim=1) for t in (key, value))
    scores = query.double() @ key.mT / 4
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value


def inputs(
    seed: int, dtype: torch.dtype, kv_heads: int, group: int, queries: int, keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, kv_heads * group, queries, 16), *[(2, kv_heads, keys, 16)] * 2]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    return npu_fused_infer_attention_score(
        query,
        key,
        value,
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        scale=0.25,
        input_layout="BNSD",
        **options,
    )


@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.integers(1, 9),
    past=st.integers(0, 9),
    mask=st.sampled_from(["none", "one", "each", "three", "two", "bytes"]),
    dtype=HALVES,
    seed=SEEDS,
)
def test_attention(
    kv_heads: int, group: int, queries: int, past: int, mask: str, dtype: torch.dtype, seed: int
) -> None:
    keys = queries + past
    query, key, value = inputs(seed, dtype, kv_heads, group, queries, keys)
    hidden = atten_mask = None
    if mask != "none":
        generator = torch.Generator().manual_seed(seed)
        batch = 2 if mask == "each" or (mask == "two" and queries == 1) else 1
        hidden = torch.rand(batch, 1, queries, keys, generator=generator) < 0.5
        hidden[..., 0] = False
        atten_mask = hidden
        if mask == "two":
            atten_mask = hidden[:, 0, 0] if queries == 1 else hidden[0, 0]
        elif mask == "three":
            atten_mask = hidden[0]
        elif mask == "bytes":
            atten_mask = hidden.to(torch.int8)
    result, lse = attend(query, key, value, atten_mask=atten_mask)
    exact = reference(query, key, value, hidden)
    # A weighted mean of values: float32 errors of scores up to 30 and of the sums, then rounding.
    bound = half_unit(exact, dtype) + value.double().abs().max() * 200 * 2**-24
    assert result.dtype == dtype and lse.shape == (0,)
    assert ((result.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("sparse_mode", "first"), [(2, 0), (3, 3)])
def test_causal_modes_count_from_the_first_or_the_last_key(
    sparse_mode: int, first: int, assert_close: AssertClose
) -> None:
    query, key, value = inputs(0, torch.bfloat16, 2, 2, 4, 7)
    hidden = torch.ones(4, 7, dtype=torch.bool).triu(1 + first)
    square = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    result, _ = attend(query, key, value, atten_mask=square, sparse_mode=sparse_mode)
    assert_close(reference(query, key, value, hidden).to(torch.bfloat16), result, 50)
    one, _ = attend(query[:, :, -1:], key, value, atten_mask=square, sparse_mode=sparse_mode)
    everything = reference(query[:, :, -1:], key, value, None)
    assert_close(everything.to(torch.bfloat16), one, 50)


def test_a_batch_of_none_gives_none() -> None:
    query, key, value = (tensor[:0] for tensor in inputs(0, torch.bfloat16, 2, 3, 4, 5))
    assert attend(query, key, value)[0].shape == (0, 6, 4, 16)


def test_true_hides_a_key() -> None:
    query, key, value = inputs(0, torch.float16, 1, 1, 1, 3)
    mask = torch.tensor([[[[True, False, True]]]])
    result, _ = attend(query, key, value, atten_mask=mask)
    assert torch.equal(result, value[:, :, 1:2])


def test_a_row_with_nothing_to_see_is_the_mean_of_all_values() -> None:
    query, key, value = inputs(0, torch.float16, 1, 1, 1, 4)
    result, _ = attend(query, key, value, atten_mask=torch.ones(1, 1, 1, 4, dtype=torch.bool))
    torch.testing.assert_close(result, value.mean(2, keepdim=True), rtol=2e-3, atol=1e-3)


def test_log_sum_exp(assert_close: AssertClose) -> None:
    query, key, value = inputs(1, torch.bfloat16, 2, 3, 4, 5)
    _, lse = attend(query, key, value, softmax_lse_flag=True)
    scores = query.double() @ key.double().repeat_interleave(3, dim=1).mT / 4
    assert_close(scores.logsumexp(-1, keepdim=True).float(), lse, 120)


@given(
    d=st.integers(1, 8).map(lambda half: 2 * half),
    mode=st.sampled_from(["half", "interleave"]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_rotary_mul(d: int, mode: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 5, d, generator=generator).to(dtype)
    r1, r2 = (torch.rand(1, 1, 5, d, generator=generator).to(dtype) for _ in range(2))
    result = npu_rotary_mul(x, r1, r2, mode)
    wide, turned = x.double(), torch.empty(x.shape, dtype=torch.float64)
    if mode == "half":
        turned[..., : d // 2], turned[..., d // 2 :] = -wide[..., d // 2 :], wide[..., : d // 2]
    else:
        turned[..., ::2], turned[..., 1::2] = -wide[..., 1::2], wide[..., ::2]
    exact = wide * r1.double() + turned * r2.double()
    size = (wide * r1.double()).abs() + (turned * r2.double()).abs()
    bound = half_unit(exact, dtype) + size * 2 * 2**-24
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= bound).all()


@given(dim=st.sampled_from([-1, 0, 1, 2]), dtype=DTYPES, seed=SEEDS)
def test_swiglu(dim: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 4, 6, generator=generator) * 4).to(dtype)
    result = npu_swiglu(x, dim)
    gate, up = x.double().chunk(2, dim)
    exact = gate / (1 + (-gate).exp()) * up
    bound = half_unit(exact, dtype) + exact.abs() * 8 * 2**-24
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= bound).all()
