"""Tensors that passes make, kept in files so that they need no memory of their own.

A stored tensor is a memory map of a file: the system can write its pages out when memory is short.
By default the file has no name any more and its space comes back when the process ends, however it
ends. With a `WorkFolder` what a pass has finished is kept under a name, see `work_folder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from panguq.tensors.nameless import empty_in_file
from panguq.tensors.work_folder import Finished, WorkFolder


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

        `unit` names the work within its compile. Raises StorageError when the disk is full.
        """
        if self.units is None:
            done = compute()
            tensors = {name: self.put(tensor) for name, tensor in done.tensors.items()}
            return Finished(tensors, done.facts)
        return self.units.find(unit) or self.units.keep(unit, compute())
