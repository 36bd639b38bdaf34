"""A folder that one process at a time works in, and that a file in it marks as panguq's.

    PANGUQ_WORK     who made the folder, and that what panguq put into it may go

Nothing is changed before the folder is locked, and nothing is deleted that does not carry the mark
and a name that panguq gives. A lock dies with its process, so a killed one blocks nobody.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from panguq.errors import StorageError

MARKER = "PANGUQ_WORK"
_KIND = "work folder of panguq, format 1"
_MADE = f"{_KIND}, made by it\n"
_GIVEN = f"{_KIND}, in a folder that was there and empty\n"
CHOOSE = "choose another folder to work in, or an empty one"


class ClaimedFolder:
    """`path` as this process's own until `release` or `remove`; `own` are the names it may use.

    Raises StorageError, and leaves everything as it was, for a folder that another process holds,
    that is not empty and carries no mark, or that holds more than `own` beside it.
    """

    def __init__(self, path: Path, own: frozenset[str] = frozenset()) -> None:
        with writing(path):
            self.path = path.resolve()
            if self.path.exists() and not self.path.is_dir():
                raise StorageError(f"{self.path} is a file", CHOOSE)
            self.own = own
            self._handle, made = _lock(self.path)
            try:
                self._mark(made)
            except BaseException:
                self.release()
                raise

    @property
    def is_held(self) -> bool:
        """Whether it still is this process's."""
        return self._handle >= 0

    def release(self) -> None:
        """Let others use the folder."""
        if self.is_held:
            os.close(self._handle)
            self._handle = -1

    def remove(self) -> None:
        """Delete what panguq put here, its mark last, and the folder if panguq made it.

        Files that someone else has put here meanwhile stay, and the folder with them. Mapped
        tensors stay readable.
        """
        if not self.is_held:
            return
        made = _read(self.path / MARKER) == _MADE
        with suppress(OSError):  # it is no reason to fail that something cannot be deleted
            for name in sorted(self.own):
                delete(self.path / name)
            delete(self.path / MARKER)
            if made:
                self.path.rmdir()
        self.release()

    def _mark(self, made: bool) -> None:
        names = {entry.name for entry in self.path.iterdir()}
        marker = self.path / MARKER
        mark = _read(marker) if MARKER in names else ""
        if names <= {MARKER} and (_MADE.startswith(mark) or _GIVEN.startswith(mark)):
            made = made or mark == _MADE  # a shorter one is of a process that died writing it
            marker.write_text(_MADE if made else _GIVEN, encoding="utf-8")
            return
        if mark not in (_MADE, _GIVEN):
            raise StorageError(
                f"{self.path} holds something else than a compile's parts: "
                f"{_listed(names)}, and no {MARKER} of this panguq",
                f"{CHOOSE}; delete it yourself if nobody needs it",
            )
        foreign = names - self.own - {MARKER}
        links = {name for name in names if (self.path / name).is_symlink()}
        if foreign or links:
            raise StorageError(
                f"{self.path} holds something else than a compile's parts: "
                f"{_listed(foreign | links)}",
                "move that away, or choose another folder to work in",
            )


def delete(path: Path) -> None:
    """Delete a file or folder, as far as it can be; links are deleted, not what they lead to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def lock_folder(path: Path) -> int | None:
    """A handle of the folder that holds its lock until it is closed; None if another holds it.

    Some network file systems cannot lock: there, nobody is kept out. Raises OSError.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        pass
    return handle


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write the compile's parts: {error.strerror or error}",
            "free some space there, or choose another folder to work in",
        ) from error


def _lock(path: Path) -> tuple[int, bool]:
    """A handle that holds the folder's lock, and whether the folder was made for it."""
    while True:
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        try:
            handle = lock_folder(path)
        except FileNotFoundError:  # whoever held it has just removed it
            continue
        if handle is None:
            raise StorageError(
                f"{path} is in use by another compile",
                "wait until it ends, or choose another place",
            )
        if _is_there(path, handle):
            return handle, made
        os.close(handle)


def _is_there(path: Path, handle: int) -> bool:
    """Whether the name still means the folder that was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _read(marker: Path) -> str:
    if marker.is_symlink() or not marker.is_file():
        return "no file"
    with open(marker, "rb") as file:
        return file.read(len(_GIVEN) + 1).decode("utf-8", "replace")


def _listed(names: set[str]) -> str:
    first = sorted(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(first) + more
