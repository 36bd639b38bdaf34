"""npu_gelu and npu_geglu: which half is activated, by which gelu, and one rounding."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from panguq.kernels.ascend.vendor.gelu import npu_geglu, npu_gelu


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("left", [False, True])
def test_half_and_form(form, left) -> None:
    first, second = torch.randn(3, 8), torch.randn(3, 8)
    gate, other = (first, second) if left else (second, first)
    product, active = npu_geglu(torch.cat((first, second), -1), -1, int(form == "tanh"), left)
    torch.testing.assert_close(active, gelu(gate, approximate=form))
    torch.testing.assert_close(product, active * other)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_the_form_that_is_asked_for(form) -> None:
    x = torch.linspace(-4, 4, 33).bfloat16()
    assert torch.equal(npu_gelu(x, approximate=form), gelu(x.float(), approximate=form).bfloat16())


def test_the_product_is_rounded_once() -> None:
    x = torch.randn(64, 32).bfloat16()
    exact, _ = npu_geglu(x.float())
    assert torch.equal(npu_geglu(x)[0], exact.bfloat16())
