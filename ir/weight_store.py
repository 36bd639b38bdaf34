"""Tensors that passes make, kept in files so that they need no memory of their own.

A stored tensor is a memory map of a file that has no name any more: the system can write its
pages out when memory is short, and gives the space back when the process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from panguq.errors import StorageError


class WeightStore:
    """Puts tensors into files under `folder` (default: the system's temporary folder).

    Tensors below `in_memory_bytes` stay in memory.
    """

    def __init__(self, folder: Path | None = None, in_memory_bytes: int = 1 << 14) -> None:
        self.folder = folder
        self.in_memory_bytes = in_memory_bytes

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor of the same values, shape and dtype, backed by a file if it is large.

        Raises StorageError when the disk is full.
        """
        tensor = tensor.detach().contiguous()
        size = tensor.numel() * tensor.element_size()
        if size < self.in_memory_bytes:
            return tensor.clone() if tensor._base is not None else tensor
        handle, path = tempfile.mkstemp(prefix="panguq-", suffix=".bin", dir=self.folder)
        try:
            if hasattr(os, "posix_fallocate"):  # elsewhere a full disk shows itself on writing
                os.posix_fallocate(handle, 0, size)
            else:
                os.ftruncate(handle, size)
            storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
        except OSError as error:
            raise StorageError(
                f"cannot write {size / 2**20:.0f} MiB of weights to {Path(path).parent}: "
                f"{error.strerror}",
                "free some space there, or set TMPDIR to a folder with more",
            ) from error
        finally:
            os.close(handle)
            os.unlink(path)
        mapped = torch.empty(0, dtype=tensor.dtype).set_(storage).view(tensor.shape)
        mapped.copy_(tensor)
        return mapped
