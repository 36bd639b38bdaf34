"""A look at a safetensors file's header before it is read: its length, and how much it lists."""

from __future__ import annotations

import os
from pathlib import Path

from panguq.errors import StorageError
from panguq.files.limits import HEADER_BYTES, MIB, TENSORS, TENSORS_IN_FILE, open_file

_ENTRY = b'"data_offsets"'  # one of these a tensor
_HINT = "the file is damaged or made to do harm; download it again"


def count_tensors(path: Path) -> int:
    """How many tensors the file lists, or a few more; none for what is no safetensors file.

    Raises StorageError for a pipe, say, and if the header is longer, or lists more, than any
    model's; OSError.
    """
    with open_file(path, _HINT) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:
            return 0  # no safetensors file; its reader says so
        if length > HEADER_BYTES:
            raise StorageError(
                f"{path}: its header has {length / MIB:.0f} MiB; the largest read has "
                f"{HEADER_BYTES // MIB} MiB",
                _HINT,
            )
        count = file.read(length).count(_ENTRY)
    if count > TENSORS_IN_FILE:
        raise StorageError(
            f"{path}: lists {count} tensors; the most read of one file is {TENSORS_IN_FILE}", _HINT
        )
    return count


def refuse_too_many(folder: Path, count: int) -> None:
    """Raises StorageError for more tensors than any checkpoint has, all files together."""
    if count > TENSORS:
        raise StorageError(f"{folder}: {count} tensors; the most read is {TENSORS}", _HINT)
