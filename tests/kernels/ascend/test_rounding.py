"""The bound that the tests of the bodies use lets one rounding pass, and nothing more."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.ascend.rounding import EPSILON, half_unit


@pytest.mark.parametrize("dtype", EPSILON)
def test_half_a_unit_allows_one_rounding_alone(dtype: torch.dtype) -> None:
    magnitude = torch.cat((torch.logspace(-4, 4, 500), torch.tensor([1e-7, 3e-8, 6e-5])))
    exact = magnitude.double() * 1.000123
    rounded = exact.to(dtype)
    assert ((rounded.double() - exact).abs() <= half_unit(exact, dtype)).all()
    for wrong in (2 * rounded, torch.zeros_like(rounded), -rounded):
        normal = exact > torch.finfo(dtype).smallest_normal
        assert ((wrong.double() - exact).abs() > half_unit(exact, dtype))[normal].all()
    # The number after next is too far, too.
    two_on = (exact * (1 + 4 * EPSILON[dtype])).to(dtype)
    normal = exact > torch.finfo(dtype).smallest_normal
    assert ((two_on.double() - exact).abs() > half_unit(exact, dtype))[normal].all()
