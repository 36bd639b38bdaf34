"""The ops of number formats against plain loops over tokens and groups."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from panguq.errors import PanguqError
from panguq.ir.number_format import FLOAT8_E4M3
from panguq.ir.ops.encode import decode_per_token, decode_weight, encode_per_token, encode_weight

FP8 = FLOAT8_E4M3.name


def rounded(values: torch.Tensor) -> torch.Tensor:
    return FLOAT8_E4M3.decode(FLOAT8_E4M3.encode(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_is_scaled_to_the_end_of_the_grid(dtype):
    x = torch.randn(3, 5, 8).to(dtype)
    codes, scale = encode_per_token(x, FP8)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    back = decode_per_token(codes, scale, FP8, dtype)
    for token, found, step in zip(x.view(-1, 8), back.view(-1, 8), scale.flatten(), strict=True):
        assert step == token.float().abs().max() / 448
        assert torch.equal(found, (rounded(token.float() / step) * step).to(dtype))


@pytest.mark.parametrize("group_size", [4, 12])
def test_weights_are_encoded_group_by_group(group_size):
    weight, scale = torch.randn(5, 12), torch.rand(5, 12 // group_size).bfloat16() + 0.1
    codes = encode_weight(weight, scale, group_size, FP8)
    back = decode_weight(codes, scale, group_size, FP8, torch.float32)
    steps = scale.float().repeat_interleave(group_size, 1)
    assert torch.equal(codes.float(), rounded(weight / steps))
    assert torch.equal(back, codes.float() * steps)


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_fault_in_one_token_shows_in_its_result_and_in_no_other(fault):
    x = torch.ones(2, 8)
    x[0, 3] = fault
    result = decode_per_token(*encode_per_token(x, FP8), FP8, torch.float32)
    assert not result[0].isfinite().all()
    assert torch.equal(result[1], torch.ones(8))


def test_a_zero_token_stays_zero():
    codes, scale = encode_per_token(torch.zeros(2, 8), FP8)
    assert not codes.float().any() and (scale > 0).all()


def test_fakes_agree_with_bodies():
    x = torch.randn(2, 3, 8).transpose(0, 1)
    opcheck(encode_per_token, (x, FP8), test_utils=("test_schema", "test_faketensor"))
    codes, scale = encode_per_token(x, FP8)
    opcheck(decode_per_token, (codes, scale, FP8, torch.bfloat16), test_utils=("test_faketensor",))
    weight, steps = torch.randn(6, 8), torch.ones(6, 2)
    opcheck(encode_weight, (weight, steps, 4, FP8), test_utils=("test_faketensor",))
    args = (encode_weight(weight, steps, 4, FP8), steps, 4, FP8, torch.float32)
    opcheck(decode_weight, args, test_utils=("test_faketensor",))


def test_a_format_that_nothing_has_is_named():
    with pytest.raises(PanguqError, match="unknown number format 'float8_e4m3'") as caught:
        encode_per_token(torch.ones(2, 4), "float8_e4m3")
    assert caught.value.hint.startswith("did you mean float8_e4m3fn?")
