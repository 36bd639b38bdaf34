"""W4A16 of panguq's own kernels: reference bodies within the summation bound, contracts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from panguq.errors import LoweringError
from panguq.ir.ops.packing import pack_int4
from panguq.kernels.ascend.own.int4_weight import codes_of_quarters, int4_quarters
from panguq.kernels.ascend.own.tiles import split_bounds
from panguq.kernels.ascend.own.w4a16 import (
    BIAS_DTYPE,
    refusal,
    w4a16,
)

TILE = [16, 128, 64]


def packed(codes):
    """int [k, n] in [-8, 7] -> int16 [k, n / 4], column c + j n / 4 in bits 4 j of word c."""
    nibbles = (codes & 15).reshape(codes.shape[0], 4, -1)
    words = (nibbles << torch.tensor([0, 4, 8, 12]).reshape(4, 1)).sum(1)
    return (words - ((words >> 15) << 16)).to(torch.int16)


def problem(*tokens, n=40, k=192, group_size=64, dtype=torch.bfloat16, offset=True, bias=True):
    """x, codes int64 [k, n], scale, offset, bias."""
    groups = -(-k // group_size) if group_size else 1
    return (
        torch.randn(*tokens, k).to(dtype),
        torch.randint(-8, 8, (k, n)),
        (torch.rand(groups, n) * 0.05 + 0.01).to(dtype),
        torch.randint(-8, 8, (groups, n)).to(dtype) if offset else None,
        torch.randn(n).to(BIAS_DTYPE[dtype]) if bias else None,
    )


def exact_weight(codes, scale, offset, group_size):
    """(code + offset) * scale in float64."""
    rows = torch.arange(len(codes)) // (group_size or len(codes))
    shifted = codes.double() if offset is None else codes + offset.double()[rows]
    return shifted * scale.double()[rows]


@given(k=st.integers(1, 40), words=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_a_word_holds_a_code_of_each_quarter(k, words):
    codes = torch.randint(-8, 8, (2 * k, 8 * words))
    assert torch.equal(int4_quarters(pack_int4(codes.t().contiguous().char())), packed(codes))
    assert torch.equal(codes_of_quarters(packed(codes)).long(), codes)


@given(
    m=st.integers(1, 20),
    words=st.integers(1, 9),
    k=st.integers(1, 400),
    splits=st.integers(1, 6),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_both_ops_are_within_the_summation_bound(m, words, k, splits, dtype, bias):
    x, codes, scale, zero, added = problem(m, n=8 * words, k=k, dtype=dtype, bias=bias)
    arguments = (x, packed(codes), scale, zero, added, 64)
    weight = exact_weight(codes, scale, zero, 64)
    exact, magnitude = x.double() @ weight, x.double().abs() @ weight.abs()
    if added is not None:
        exact, magnitude = exact + added, magnitude + added.abs()
    # k + splits + 1 additions in float32, one product and one addition for each group and part,
    # then half the distance of two neighbours of the result.
    additions = (k + splits + 1 + 2 * (-(-k // 64) + splits)) * 2.0**-24
    summed = additions / (1 - additions) * magnitude
    rounded = torch.finfo(dtype).eps / 2 * (exact.abs() + summed) + 2.0**-25
    results = [w4a16(*arguments, 1, TILE)]
    if splits <= -(-k // TILE[2]):
        results.append(w4a16(*arguments, splits, TILE))
    for result in results:
        assert ((result.double() - exact).abs() <= summed + rounded).all()


def test_partial_sums_are_of_whole_blocks_and_added_in_their_order():
    x, codes, scale, _, _ = problem(3, n=8, k=200, offset=False, bias=False)
    total = torch.zeros(3, 8)
    for part, (start, stop) in enumerate(split_bounds(200, 64, 3)):
        groups = range(start, stop, 64)
        assert (part, len(groups)) in ((0, 1), (1, 1), (2, 2))
        partial = torch.zeros(3, 8)
        for at in groups:
            last = min(at + 64, stop)
            products = x.float()[:, at:last] @ codes[at:last].float()
            partial += products * scale[at // 64].float()
        total += partial
    result = w4a16(x, packed(codes), scale, None, None, 64, 3, TILE)
    assert torch.equal(result, total.bfloat16())


@pytest.mark.parametrize("tokens", [(1,), (7,), (2, 5), (0,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [0, 64])
def test_fakes(tokens, dtype, group_size):
    x, codes, scale, zero, bias = problem(*tokens, dtype=dtype, group_size=group_size)
    arguments = (x, packed(codes), scale, zero, bias, group_size)
    opcheck(w4a16, (*arguments, 1, TILE))
    opcheck(w4a16, (*arguments, 2, TILE))
    assert w4a16(*arguments, 2, TILE).shape == (*tokens, 40)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(3, 192)}, "x is torch.float32, not float16 or bfloat16"),
        ({"x": torch.randn(3, 128).bfloat16()}, "x has 128 inputs, weight 192"),
        ({"weight": torch.zeros(192, 5, dtype=torch.int32)}, "weight is torch.int32, not int16"),
        ({"scale": torch.ones(3, 40)}, "scale is torch.float32, x is torch.bfloat16"),
        ({"scale": torch.ones(2, 40).bfloat16()}, r"scale is \[2, 40\], not \[3, 40\]"),
        ({"offset": torch.ones(40).bfloat16()}, "offset is"),
        ({"bias": torch.ones(40).bfloat16()}, "bias is torch.bfloat16; with x of torch.bfloat16"),
        ({"bias": torch.ones(8)}, r"bias is \[8\], not \[40\]"),
        ({"group_size": 48}, "block_k=64 does not divide the group size 48"),
        ({"splits": 4}, "4 splits: k=192 has only 3 blocks of 64"),
        ({"splits": 0}, "0 splits"),
        ({"tile": [16, 128]}, "is not"),
        ({"tile": [16, 512, 64]}, "bytes of UB"),
    ],
)
def test_wrong_arguments_are_refused(changed, message):
    x, codes, scale, zero, bias = problem(3)
    arguments = {"x": x, "weight": packed(codes), "scale": scale, "offset": zero, "bias": bias}
    arguments |= {"group_size": 64, "splits": 2, "tile": TILE} | changed
    with pytest.raises(LoweringError, match=message):
        w4a16(**arguments)


def test_refusal_without_a_tile():
    assert refusal(None, 4096, 4096, 128) is None
    assert refusal(16, 36, 64, 32) == ("n=36 is not a multiple of 8, as 4-bit weights need")
    assert refusal(16, 40, 100, 32, splits=4, tile=(16, 256, 32)) is None
