"""Where built code lies: the user's own cache, and never a model's folder.

    $PANGUQ_CACHE, else ~/.cache/panguq
      built/                         mode 0700
        <graph>-<machine>/           one build: built.json, and a library a part
        .<graph>-<machine>.lock      held by the process that builds it

Libraries are code, and loading one runs it. So a folder that belongs to somebody else, or into
which others may write, is refused with everything in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from panguq.errors import StorageError

_CHOOSE = "give PANGUQ_CACHE a folder of your own"


def cache_folder() -> Path:
    """The folder of all builds, which may not be there. Raises StorageError for a relative path."""
    given = os.environ.get("PANGUQ_CACHE")
    if given is not None and not Path(given).is_absolute():
        raise StorageError(f"PANGUQ_CACHE={given!r} is not an absolute path", _CHOOSE)
    try:
        base = Path(given) if given is not None else Path.home() / ".cache" / "panguq"
    except RuntimeError as error:  # a user without a home
        raise StorageError("this user has no home folder to keep built code in", _CHOOSE) from error
    return base / "built"


def make_cache_folder() -> Path:
    """The folder of all builds, made for this user alone. Raises StorageError if it cannot be, or
    is not safe."""
    folder = cache_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be made: {error.strerror or error}", _CHOOSE
        ) from error
    check_own(folder)
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{folder}: cannot be written", _CHOOSE)
    return folder


def check_own(path: Path) -> None:
    """Raises StorageError unless `path`, and the folder that it lies in, are this user's own, no
    links, and closed to writes of others; OSError if it is not there."""
    for place in (path.parent, path):
        found = os.lstat(place)
        if stat.S_ISLNK(found.st_mode):
            raise StorageError(f"{place} is a link, so no code in it is run", _CHOOSE)
        if found.st_uid != os.geteuid():
            raise StorageError(f"{place} belongs to another user, so no code in it is run", _CHOOSE)
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StorageError(
                f"others may write into {place}, so no code in it is run",
                f"chmod go-w {place}, and delete what is in it",
            )


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold a build's name; a second process waits here until the first has built it.

    Raises StorageError if there can be no lock. A lock dies with its process.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(folder / f".{name}.lock", flags, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            os.close(handle)
            raise
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be locked: {error.strerror or error}", _CHOOSE
        ) from error
    try:
        yield
    finally:
        os.close(handle)
