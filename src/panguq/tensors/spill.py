"""Values that wait between blocks, in memory or, where all of them take too much, in files.

The heap's free pages go back to the system at once. The C library could reuse little of them: a
few bytes that stay, such as those of a mapping, lie between one freed block and the next, and a
block of the same size with an alignment no longer fits. Without this, a compile grows by as much as
it spills.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor

from panguq.tensors.memory import return_free_pages
from panguq.tensors.weight_store import WeightStore

SPILL_BYTES = 1 << 28
"""Activations that wait between blocks go to files where they would take more memory than this."""


def held_bytes(value: Any) -> int:
    """The memory that a value takes: none if it is no tensor, or lies in a file."""
    if not isinstance(value, Tensor) or value.untyped_storage().filename is not None:
        return 0
    return value.nbytes


def to_files(environments: Iterable[MutableMapping[Any, Any]]) -> None:
    """Put all values into files that take memory and have the plain layout.

    Another layout may make a kernel round in another order, and a file would change it.
    """
    for environment in environments:
        for node, value in environment.items():
            if held_bytes(value) and value.is_contiguous():
                environment[node] = WeightStore().put(value)
    return_free_pages()
