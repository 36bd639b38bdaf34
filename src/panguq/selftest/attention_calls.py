"""Calls of rotary embedding and attention, with m tokens."""

from __future__ import annotations

from typing import Any

import torch

from panguq.selftest.operands import Arguments, reals


def rotary_call(m: int, layout: str, dtype: torch.dtype, mode: str = "half") -> Arguments:
    """Tables for all heads, of which there are 4."""
    shapes = {
        "BNSD": ((1, 4, m, 64), (1, 1, m, 64)),
        "BSND": ((2, m, 4, 64), (1, m, 1, 64)),
        "TND": ((m, 4, 64), (m, 1, 64)),
    }
    x, table = shapes[layout]
    return {
        "input": reals(*x, dtype=dtype),
        "r1": reals(*table, dtype=dtype),
        "r2": reals(*table, dtype=dtype),
        "rotary_mode": mode,
    }


def attention_call(m: int, dtype: torch.dtype, heads: int, kv_heads: int, **rest: Any) -> Arguments:
    """m queries and keys of a batch of 2."""
    return {
        "query": reals(2, heads, m, 64, dtype=dtype),
        "key": reals(2, kv_heads, m, 64, dtype=dtype),
        "value": reals(2, kv_heads, m, 64, dtype=dtype),
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": 0.125,
        "input_layout": "BNSD",
        **rest,
    }


def causal(*shape: int) -> torch.Tensor:
    """True where a key is hidden."""
    return torch.ones(shape, dtype=torch.bool).triu(1)
