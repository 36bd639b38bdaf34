"""Tensors that passes make, kept in files so that they need no memory of their own.

A stored tensor is a memory map of a file: the system can write its pages out when memory is short.
By default the file has no name any more and its space comes back when the process ends, however it
ends. With a `WorkFolder` what a pass has finished is kept under a name, see `work_folder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from panguq.ranks import ranks
from panguq.tensors.nameless import empty_in_file
from panguq.tensors.work_folder import Finished, WorkFolder

Found = TypeVar("Found", Finished, Finished | None)


@dataclass(frozen=True)
class Unit:
    """Work that has a name within its compile, what it costs compared with others, and the work."""

    name: str
    cost: float
    compute: Callable[[], Finished]


class WeightStore:
    """Puts tensors into files under `folder` (default: the system's temporary folder).

    Tensors below `in_memory_bytes` stay in memory. `units` remembers what passes have finished.
    """

    def __init__(
        self,
        folder: Path | None = None,
        in_memory_bytes: int = 1 << 14,
        units: WorkFolder | None = None,
    ) -> None:
        self.folder = folder
        self.in_memory_bytes = in_memory_bytes
        self.units = units

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor of the same values, shape and dtype, backed by a file if it is large.

        Raises StorageError when the disk is full.
        """
        tensor = tensor.detach().contiguous()
        size = tensor.numel() * tensor.element_size()
        if size < self.in_memory_bytes:
            return tensor.clone() if tensor._base is not None else tensor
        mapped = self.empty(tensor.shape, tensor.dtype)
        mapped.copy_(tensor)
        return mapped

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled, backed by a file if it is large.

        Raises StorageError when the disk is full.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if size < self.in_memory_bytes:
            return torch.empty(shape, dtype=dtype)
        folder = self.folder or (self.units.temporary if self.units else None)
        return empty_in_file(shape, dtype, folder)

    def once(self, unit: str, compute: Callable[[], Finished]) -> Finished:
        """What `compute` yields, its tensors stored; or what an earlier run has kept of it.

        `unit` names the work within its compile. Of several ranks the first computes, alone, and
        all get what it has. Raises StorageError when the disk is full.
        """
        return self._of_first(lambda: [self._kept(unit) or self._stored(unit, compute())])[0]

    def together(self, unit: str, compute: Callable[[], Finished]) -> Finished:
        """As `once`, of what all ranks compute together, each having the whole in the end."""
        if ranks().count == 1:
            return self.once(unit, compute)
        kept = self._of_first(lambda: [self._kept(unit)])[0]
        return self._stored(unit, compute()) if kept is None else kept

    def each(self, units: Sequence[Unit]) -> list[Finished]:
        """As `once` of each of several units, which ranks divide."""
        if ranks().count == 1:
            return [self.once(unit.name, unit.compute) for unit in units]
        known = self._of_first(lambda: [self._kept(unit.name) for unit in units])
        left = [unit for unit, kept in zip(units, known, strict=True) if kept is None]
        made = iter(ranks().each(left, lambda unit: unit.cost, lambda unit: unit.compute()))
        return [
            self._stored(unit.name, next(made)) if kept is None else kept
            for unit, kept in zip(units, known, strict=True)
        ]

    def _of_first(self, find: Callable[[], list[Found]]) -> list[Found]:
        found = ranks().from_first(find)
        if ranks().is_first:
            return found
        return [done if done is None else self._put(done) for done in found]

    def _kept(self, unit: str) -> Finished | None:
        return None if self.units is None else self.units.find(unit)

    def _stored(self, unit: str, done: Finished) -> Finished:
        return self._put(done) if self.units is None else self.units.keep(unit, done)

    def _put(self, done: Finished) -> Finished:
        return Finished({name: self.put(t) for name, t in done.tensors.items()}, done.facts)
