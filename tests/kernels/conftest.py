"""How kernel results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

AssertClose = Callable[[Tensor, Tensor, float], None]


def sqnr_db(expected: Tensor, result: Tensor) -> float:
    """Signal to noise in dB: infinite for equal tensors, 0 or less for a doubled one."""
    signal = expected.double().square().sum().item()
    noise = (expected.double() - result.double()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@pytest.fixture(scope="module", autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assert_close() -> AssertClose:
    """assert_close(expected, result, least_db): same shape and dtype, and at least that SQNR."""

    def check(expected: Tensor, result: Tensor, least_db: float) -> None:
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        assert sqnr_db(expected, result) >= least_db

    return check
