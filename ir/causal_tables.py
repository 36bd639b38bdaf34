"""Attention that looks a causal mask up in a table, as GPT-Neo's does.

A lookup ends where the table does, and a graph of any length has no such end: the entries are
computed instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CausalTable:
    """Stands for `[1, 1, n, n]` booleans, True where a row's token attends to a column's."""

    def __init__(self, window: int | None) -> None:
        self.window = window

    def __getitem__(self, index: tuple[slice, slice, slice, slice]) -> Tensor:
        rows, columns = index[2:]
        queries = torch.arange(rows.start, rows.stop)[:, None]
        keys = torch.arange(columns.stop)
        attended = keys <= queries
        if self.window is not None:
            attended = torch.logical_and(attended, keys > queries - self.window)
        return attended[None, None]


def compute_causal_tables(skeleton: nn.Module) -> None:
    """Let a copied model compute what it looks up in tables of causal masks."""
    for module in skeleton.modules():
        owner: Any = module
        kind, table = getattr(module, "attention_type", None), getattr(module, "bias", None)
        if kind not in ("global", "local") or not isinstance(table, Tensor):
            continue
        if table.dtype is torch.bool and table.dim() == 4 and table.shape[-1] == table.shape[-2]:
            del module._buffers["bias"]
            owner.bias = CausalTable(owner.config.window_size if kind == "local" else None)
