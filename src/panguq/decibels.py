"""Ratios of powers in dB, and how they are written."""

from __future__ import annotations

import math

from torch import Tensor


def decibels(ratio: float) -> float:
    """10 log10 of a ratio of powers, at least -300."""
    return 10 * math.log10(max(ratio, 1e-30))


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """10 log10 of signal power over noise power; inf if equal, -inf if not finite."""
    signal = reference.double().square().sum().item()
    noise = (reference.double() - actual.double()).square().sum().item()
    return ratio_db(signal, noise)


def ratio_db(signal: float, noise: float) -> float:
    """10 log10 of two powers; inf without noise, -inf if it is not finite."""
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise)


def finite_db(db: float) -> float:
    """JSON knows no infinity: an exact result (inf) and a broken one (-inf) become +-999 dB."""
    return round(max(min(db, 999.0), -999.0), 2) if not math.isnan(db) else -999.0


def spelled(db: float) -> str:
    """`31.2 dB` of what `finite_db` gave, in words where values are equal or one is not finite."""
    if db >= 999.0:
        return "equal"
    return "not finite" if db <= -999.0 else f"{db:.1f} dB"
