"""Split-K against the data-parallel W4A16 kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.timings import read
from panguq.kernels.ascend.own.triton.launch import launch_w4a16

TOKENS = (1, 4, 16, 64)
# Few, so that compiling them leaves time to run them.
TILES = ((16, 128, 64), (16, 256, 128))
SPLITS = (1, 2, 4, 8, 16)
GROUP = 128
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Row:
    """A shape, and the microseconds of every tile and number of splits."""

    m: int
    n: int
    k: int
    us: dict[str, float]
    data_parallel_us: float
    split_k_us: float

    @property
    def gain(self) -> float:
        """How many times faster Split-K is, each at its fastest."""
        return self.data_parallel_us / self.split_k_us


def time_grid(timer: Timer, ends: Callable[[], bool]) -> list[Row]:
    """Every shape of bench/data/w4a16_grid.csv for every m, until `ends` says that time is up.

    timer: microseconds of a call.
    """
    rows = []
    for shape in read("w4a16_grid.csv"):
        n, k = int(shape["n"]), int(shape["k"])
        weight = torch.randint(-(2**15), 2**15, (k, n // 4), dtype=torch.int16, device="cuda")
        scale = torch.rand(-(-k // GROUP), n, device="cuda").half() * 0.01
        for m in TOKENS:
            if ends():
                return rows
            x = torch.randn(m, k, device="cuda").half()
            times = {}
            for splits in SPLITS:
                for tile in TILES:
                    given = (x, weight, scale, None, None, GROUP, splits, list(tile))
                    times[splits, tile] = timer(partial(launch_w4a16, *given))
            whole = min(us for (splits, _), us in times.items() if splits == 1)
            split = min(us for (splits, _), us in times.items() if splits > 1)
            named = {f"{splits} splits, {tile}": us for (splits, tile), us in times.items()}
            rows.append(Row(m, n, k, named, whole, split))
    return rows
