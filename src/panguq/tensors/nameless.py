"""Tensors in files without a name: the system can write their pages out when memory is short.

The space comes back when the last tensor of a file goes, or the process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from panguq.errors import StorageError

LARGE_BYTES = 1 << 28
"""What is computed of weights and as large as this, such as those of all experts of a layer, takes
no memory of its own."""


def empty_in_file(shape: Sequence[int], dtype: torch.dtype, folder: Path | None = None) -> Tensor:
    """A tensor to be filled, in a new file under `folder` (default: the system's temporary folder).

    Raises StorageError when the disk is full.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        storage = _nameless(folder, size)
    except OSError as error:
        raise StorageError(
            f"cannot write {size / 2**20:.0f} MiB of weights to "
            f"{folder or tempfile.gettempdir()}: {error.strerror or error}",
            "free some space there, or set TMPDIR to a folder with more",
        ) from error
    mapped: Tensor = torch.empty(0, dtype=dtype).set_(storage).view(shape)
    return mapped


def roomy_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled: in memory, or from `LARGE_BYTES` on in a file.

    Raises StorageError when the disk is full.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.empty(shape, dtype=dtype) if size < LARGE_BYTES else empty_in_file(shape, dtype)


def _nameless(folder: Path | None, size: int) -> torch.UntypedStorage:
    """A map of a new file of this size, whose name is gone already. Raises OSError."""
    handle, path = tempfile.mkstemp(prefix="panguq-", suffix=".bin", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # elsewhere a full disk shows itself on writing
            os.posix_fallocate(handle, 0, size)
        else:
            os.ftruncate(handle, size)
        found = torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
        assert isinstance(found, torch.UntypedStorage)
        return found
    finally:
        os.close(handle)
        os.unlink(path)
