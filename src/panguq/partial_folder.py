"""A folder that appears under its name only when it is complete."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from panguq.errors import StorageError

PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-[0-9a-f]{8}")
_REPLACED = re.compile(r"\.(?P<name>.+)\.replaced-[0-9a-f]{8}")


@contextmanager
def partial_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target` to write into; renamed to `target` when the block ends well.

    Whatever ends the block otherwise removes it. A killed process leaves it behind, and the
    next save under the same name clears it away: a lock, which dies with its process, tells
    the folders of the dead from those that someone is writing at the moment.
    """
    _clear_abandoned(target)
    folder = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems cannot lock
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
        os.fsync(handle)
        _move_into_place(folder, target, overwrite)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def replaced_copies(target: Path) -> list[Path]:
    """What an overwrite that was killed between its two renames has put aside."""
    return _siblings(target, _REPLACED)


def _siblings(target: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not target.parent.is_dir():
        return []
    matches = ((path, pattern.fullmatch(path.name)) for path in target.parent.iterdir())
    return sorted(path for path, match in matches if match and match["name"] == target.name)


def _clear_abandoned(target: Path) -> None:
    for path in _siblings(target, PARTIAL):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:  # its writer is alive, or nobody can tell
            continue
        finally:
            os.close(handle)


def _move_into_place(folder: Path, target: Path, overwrite: bool) -> None:
    aside = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    try:
        if overwrite and target.exists():
            os.rename(target, aside)
        if target.exists():
            raise StorageError(f"{target} appeared while it was being written", "save again")
        os.rename(folder, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    _sync(target.parent)
    for old in replaced_copies(target):
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
