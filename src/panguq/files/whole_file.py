"""A file that appears under its name only when it is complete."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from panguq.errors import PanguqError


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write a new file, and wait until the disk has it; returns its size as `bytes` and its
    `sha256`. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            digest.update(chunk)
            rest = memoryview(chunk)
            while rest:  # a disk that fills up takes a part first
                written = file.write(rest)
                rest, size = rest[written:], size + written
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new name beside `path` to write a file under; renamed to `path` when the block ends well.

    A reader of `path` sees the old file or the new one. Whatever ends the block otherwise removes
    what was written. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def output_file(path: Path, kind: type[PanguqError]) -> Iterator[Path]:
    """A `whole_file` that a person asked for. Raises `kind`, naming it, if it cannot be written."""
    try:
        with whole_file(path) as partial:
            yield partial
    except OSError as error:
        raise kind(
            f"{path}: cannot be written: {error.strerror or error}", "choose another place"
        ) from error
