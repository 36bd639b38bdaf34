"""Several processes, forked from a test, that know each other through torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def run_ranks(count: int, place: Path, work: Callable[[int], str]) -> list[str | None]:
    """What `work(rank)` returns in each of `count` processes: text, its error's, or None for one
    that was killed. `place` is a folder for their meeting."""
    place.mkdir()
    children = [_fork(rank, count, place, work) for rank in range(count)]
    for child in children:
        os.waitpid(child, 0)
    said = [place / str(rank) for rank in range(count)]
    return [file.read_text() if file.exists() else None for file in said]


def _fork(rank: int, count: int, place: Path, work: Callable[[int], str]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        meeting, most = f"file://{place / 'meeting'}", timedelta(seconds=60)
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=count, timeout=most
        )
        try:
            text = work(rank)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        (place / str(rank)).write_text(text)
    finally:
        os._exit(0)
