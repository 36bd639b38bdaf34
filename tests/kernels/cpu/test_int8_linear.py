"""W8A8: integer sums are exact for every shape and every code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from panguq.kernels.cpu import int8_linear as module
from panguq.kernels.cpu.int8_linear import int8_linear, reference, refusal, weight_row_sums

CODES = st.sampled_from(["random", "lowest", "highest", "alternating"])


def codes_of(kind, *shape):
    if kind == "random":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    codes = torch.full(shape, 127 if kind == "highest" else -128, dtype=torch.int8)
    if kind == "alternating":
        codes[..., ::2] = 127
    return codes


def int32_sums(codes, weight, zero_point):
    """The op with unit scales in float64: its integer part, unrounded."""
    row_sums = None if zero_point is None else weight_row_sums(weight)
    ones = torch.ones(1), torch.ones(len(weight))
    result = int8_linear(codes, ones[0], zero_point, weight, ones[1], row_sums, None, torch.float32)
    return result.to(torch.int64)


@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(2, 255),
    codes_kind=CODES,
    weight_kind=CODES,
    zero_point=st.sampled_from([None, -128, 3, 127]),
)
@settings(deadline=None, max_examples=200)
def test_sums_are_exact(m, n, k, codes_kind, weight_kind, zero_point):
    codes, weight = codes_of(codes_kind, m, k), codes_of(weight_kind, n, k)
    offset = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int32)
    # Below 2**24 float32 holds every sum: 255 * 255 * 128 < 2**24.
    expected = (codes.long() - (zero_point or 0)) @ weight.long().t()
    assert torch.equal(int32_sums(codes, weight, offset), expected)


@pytest.mark.parametrize("k", [576, 1536, 2500])
@pytest.mark.parametrize("kind", ["random", "lowest", "highest", "alternating"])
def test_both_ways_to_multiply_are_exact(monkeypatch, kind, k):
    codes, weight = codes_of(kind, 5, k), codes_of(kind, 7, k)
    expected = codes.long() @ weight.long().t()
    for exact in (True, False) if module.int_mm_is_exact() else (False,):
        monkeypatch.setattr(module, "int_mm_is_exact", lambda exact=exact: exact)
        assert torch.equal(module.int32_matmul(codes, weight).long(), expected)


@pytest.mark.parametrize("tokens", [(1,), (7,), (2, 5), (0,), (2, 1, 3)])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("zero_point", [None, torch.tensor([9], dtype=torch.int32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_fake(assert_close, tokens, per_token, with_bias, zero_point, dtype):
    codes, weight = codes_of("random", *tokens, 48), codes_of("random", 33, 48)
    act_scale = torch.rand(*tokens, 1) if per_token else torch.rand(1)
    weight_scale = torch.rand(33, 1) if per_token else torch.rand(33)
    bias = torch.randn(33) if with_bias else None
    row_sums = weight_row_sums(weight) if with_bias else None
    arguments = (codes, act_scale, zero_point, weight, weight_scale, row_sums, bias, dtype)
    least_db = 100 if dtype == torch.float32 else 45
    assert_close(reference(*arguments), int8_linear(*arguments), least_db)
    opcheck(int8_linear, arguments)


def test_a_part_of_a_wider_tensor_is_taken_by_position():
    wide, weight = codes_of("random", 6, 40), codes_of("random", 8, 20)
    part = wide[:, 20:]
    assert torch.equal(int32_sums(part, weight, None), int32_sums(part.clone(), weight, None))


def test_row_sums():
    weight = codes_of("random", 5, 600)
    assert weight_row_sums(weight).tolist() == [sum(row) for row in weight.tolist()]
    opcheck(weight_row_sums, (weight,))


def test_refusals_name_the_reason():
    assert refusal(None, 7, 577) is None
    assert "single input column" in refusal(1, 8, 1)
    assert "int32" in refusal(1, 8, 65794)
