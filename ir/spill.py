"""Values that wait between blocks, in memory or, where all of them take too much, in files."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from panguq.ir.weight_store import WeightStore

SPILL_BYTES = 1 << 28
"""Activations that wait between blocks go to files where they would take more memory than this."""


def held_bytes(value: Any) -> int:
    """The memory that a value takes: none if it is no tensor, or lies in a file."""
    if not isinstance(value, Tensor) or value.untyped_storage().filename is not None:
        return 0
    return value.nbytes


def to_file(value: Any) -> Any:
    """The same value in a file, if it takes memory and has the plain layout.

    Another layout may make a kernel round in another order, and a file would change it.
    """
    return WeightStore().put(value) if held_bytes(value) and value.is_contiguous() else value
