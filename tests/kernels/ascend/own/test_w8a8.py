"""W8A8 of panguq's own kernels: exact sums in one part or several, contracts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from panguq.errors import LoweringError
from panguq.kernels.ascend.own.w8a8 import LARGEST_K, refusal, w8a8
from panguq.kernels.cpu.int8_linear import int32_matmul

TILE = [16, 256, 256]
KINDS = st.sampled_from(["random", "lowest", "highest"])


def int8(kind, *shape):
    if kind == "random":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    return torch.full(shape, 127 if kind == "highest" else -128, dtype=torch.int8)


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    k=st.integers(1, 1500),
    x_kind=KINDS,
    weight_kind=KINDS,
)
@settings(deadline=None, max_examples=100)
def test_sums_are_exact(m, n, k, x_kind, weight_kind):
    x, weight = int8(x_kind, m, k), int8(weight_kind, k, n)
    assert torch.equal(int32_matmul(x, weight.t()).long(), x.long() @ weight.long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("bias", "per_token"), [("float", True), ("float", False), ("int32", False), (None, True)]
)
@pytest.mark.parametrize("tokens", [(1,), (2, 5), (0,)])
def test_output_fake_and_split_k(assert_close, dtype, bias, per_token, tokens):
    x, weight, scale = int8("random", *tokens, 600), int8("random", 600, 33), torch.rand(33) * 0.01
    token_scale = torch.rand(tokens) if per_token else None
    added = {"float": torch.randn(33), "int32": torch.arange(33, dtype=torch.int32), None: None}
    arguments = (x, weight, scale, token_scale, added[bias], dtype)
    result = w8a8(*arguments, 1, TILE)
    assert torch.equal(result, w8a8(*arguments, 3, TILE))

    total = (x.long() @ weight.long()).double()
    if bias == "int32":
        total += added[bias]
    expected = total * scale * (token_scale[..., None] if per_token else 1.0)
    if bias == "float":
        expected = expected + added[bias]
    least_db = {torch.bfloat16: 48, torch.float16: 65, torch.float32: 120}[dtype]
    assert_close(expected.to(dtype), result, least_db)

    opcheck(w8a8, (*arguments, 1, TILE))
    opcheck(w8a8, (*arguments, 3, TILE))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 600)}, "x is torch.float32, not int8"),
        ({"x": int8("random", 3, 599)}, "x has 599 inputs, weight 600"),
        ({"weight": torch.zeros(600, 33, dtype=torch.int32)}, "weight is torch.int32, not int8"),
        ({"scale": torch.ones(33, dtype=torch.bfloat16)}, "scale is torch.bfloat16, not float32"),
        ({"scale": torch.ones(1, 33)}, r"scale is \[1, 33\], not \[33\]"),
        ({"pertoken_scale": torch.ones(3, 1)}, r"pertoken_scale is \[3, 1\], not \[3\]"),
        ({"bias": torch.ones(33, dtype=torch.int32)}, "int32 without pertoken_scale"),
        ({"bias": torch.ones(33, dtype=torch.bfloat16)}, "bias is torch.bfloat16"),
        ({"output_dtype": torch.int8}, "output_dtype torch.int8 is no float dtype"),
        ({"splits": 4}, "4 splits: k=600 has only 3 blocks of 256"),
        ({"tile": [256, 256, 256]}, "bytes of L0C"),
    ],
)
def test_wrong_arguments_are_refused(changed, message):
    arguments = {"x": int8("random", 3, 600), "weight": int8("random", 600, 33)}
    arguments |= {"scale": torch.ones(33), "pertoken_scale": torch.ones(3), "bias": None}
    arguments |= {"output_dtype": torch.bfloat16, "splits": 2, "tile": TILE} | changed
    with pytest.raises(LoweringError, match=message):
        w8a8(**arguments)


def test_the_largest_k_is_the_last_that_fits_int32():
    assert refusal(None, 8, LARGEST_K) is None
    assert "might not fit int32" in refusal(None, 8, LARGEST_K + 1)
    assert LARGEST_K * 128 * 128 < 2**31 <= (LARGEST_K + 1) * 128 * 128
