"""Dynamic quantization by panguq's own kernel: what it documents, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from panguq.errors import LoweringError
from panguq.kernels.ascend.own.dynamic_quant import dynamic_quant

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@given(
    m=st.integers(1, 9),
    k=st.integers(1, 300),
    exponent=st.integers(-44, 30),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=150)
def test_codes_are_the_nearest_and_the_largest_value_is_127(m, k, exponent, dtype):
    x = (torch.randn(m, k, dtype=torch.float64) * 10.0**exponent).clamp(-6e4, 6e4).to(dtype)
    codes, scale = dynamic_quant(x)
    assert torch.equal(scale, x.float().abs().amax(1) / 127)
    normal = scale >= torch.finfo(torch.float32).tiny
    assert (codes[normal].abs().amax(1) == 127).all()
    assert (codes[~normal] == 0).all()
    error = (x.double() - codes * scale.double()[:, None]).abs()
    # Half a step, and the rounding of scale and quotient, each 2**-24 of at most 127 steps.
    assert (error[normal] <= (0.5 + 127 * 2.0**-23) * scale[normal, None].double()).all()


def test_ties_go_to_even():
    codes, scale = dynamic_quant(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]))
    assert scale == 1
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_a_token_of_zeros_has_codes_and_scale_zero():
    codes, scale = dynamic_quant(torch.zeros(2, 3, 8, dtype=torch.bfloat16))
    assert (codes == 0).all()
    assert (scale == 0).all()


@pytest.mark.parametrize("tokens", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake(tokens, dtype):
    opcheck(dynamic_quant, (torch.randn(*tokens, 16).to(dtype),))


def test_refused_inputs():
    with pytest.raises(LoweringError, match="not a float dtype"):
        dynamic_quant(torch.zeros(3, 4, dtype=torch.int8))
    with pytest.raises(LoweringError, match="a token without values"):
        dynamic_quant(torch.zeros(3, 0))
