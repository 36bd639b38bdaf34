"""Ratios of powers in dB, with the ends where a logarithm has none."""

from __future__ import annotations

import math

import pytest
import torch

from panguq.decibels import decibels, finite_db, ratio_db, spelled, sqnr_db


def test_a_tenth_of_the_power_is_ten_decibels_less() -> None:
    assert decibels(0.1) == pytest.approx(-10)
    assert decibels(0.0) == pytest.approx(-300)
    assert ratio_db(100.0, 1.0) == pytest.approx(20)
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(20)


@pytest.mark.parametrize(
    ("noise", "db", "number", "words"),
    [
        (0.0, math.inf, 999.0, "equal"),
        (math.nan, -math.inf, -999.0, "not finite"),
        (math.inf, -math.inf, -999.0, "not finite"),
        (0.5, 10 * math.log10(2), 3.01, "3.0 dB"),
    ],
)
def test_the_ends(noise: float, db: float, number: float, words: str) -> None:
    assert ratio_db(1.0, noise) == pytest.approx(db)
    assert finite_db(ratio_db(1.0, noise)) == number
    assert spelled(number) == words


def test_nan_is_the_worst_number() -> None:
    assert finite_db(math.nan) == -999.0
