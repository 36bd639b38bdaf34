"""A folder that appears under its name only when it is complete.

While it is written it carries a mark, so that what a killed process left behind can be told from
somebody's own folder of that name, which is never touched.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from panguq.errors import StorageError

PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-[0-9a-f]{8}")
_REPLACED = re.compile(r"\.(?P<name>.+)\.replaced-[0-9a-f]{8}")
MARKER = "PANGUQ_PARTIAL"
_ADDED_BYTES = len(".") + len(".replaced-01234567")

IsOurs = Callable[[Path], bool]
"""Whether this is a whole folder of the kind that is written, so that it may be replaced."""


def check_name(target: Path) -> None:
    """Raises StorageError for a name that leaves no room for those that are used meanwhile."""
    parent = target.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    longest = os.pathconf(parent, "PC_NAME_MAX") - _ADDED_BYTES
    if len(os.fsencode(target.name)) > longest:
        raise StorageError(
            f"{target.name[:40]}…: a name of {len(os.fsencode(target.name))} bytes",
            f"the file system of {parent} takes {longest} bytes here; choose a shorter name",
        )


def is_taken(target: Path, overwrite: bool) -> bool:
    """Whether a folder with something in it has this name, which only its writer may replace.

    Raises StorageError for a place where no folder can be written at all.
    """
    if not target.name:
        raise StorageError(f"{target} cannot be replaced", "name a folder in it")
    check_name(target)
    if not target.exists():
        return False
    if not overwrite:
        raise StorageError(f"{target} already exists", "choose another, or pass overwrite=True")
    if not target.is_dir():
        raise StorageError(f"{target} is a file", "choose another path")
    return any(target.iterdir())


def check_no_more(target: Path, written: Set[str]) -> None:
    """Refuse to replace a folder that holds what panguq has not written. Raises StorageError."""
    others = sorted(path.name for path in target.iterdir() if path.name not in written)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise StorageError(
            f"{target} is not overwritten: it holds {', '.join(others[:3])}{more}, which panguq "
            "did not write",
            "move that away, or choose another path",
        )


@contextmanager
def partial_folder(
    target: Path, overwrite: bool, is_ours: IsOurs = lambda _: False
) -> Iterator[Path]:
    """A new folder beside `target` to write into; renamed to `target` when the block ends well.

    Whatever ends the block otherwise removes it. A killed process leaves it behind, and the
    next save under the same name clears it away: its mark tells it from a folder of somebody's,
    and a lock, which dies with its process, from those that someone is writing at the moment.
    `overwrite` replaces a `target` that `is_ours` or empty.
    """
    check_name(target)
    _clear_abandoned(target)
    folder = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems cannot lock
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / MARKER).touch(exist_ok=False)
        yield folder
        (folder / MARKER).unlink()
        os.fsync(handle)
        _move_into_place(folder, target, overwrite, is_ours)
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
            if (path / MARKER).is_file():
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # its writer is alive, or nobody can tell
            continue
        finally:
            os.close(handle)


def _move_into_place(folder: Path, target: Path, overwrite: bool, is_ours: IsOurs) -> None:
    aside = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    try:
        if overwrite and target.is_dir() and (is_ours(target) or not any(target.iterdir())):
            os.rename(target, aside)
        if target.exists():
            raise StorageError(
                f"{target} appeared while it was being written, or was changed",
                "save again, or choose another name",
            )
        os.rename(folder, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    sync(target.parent)
    for old in replaced_copies(target):
        if old == aside or is_ours(old):
            shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the disk has this file, or the names in this folder. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
