"""Room on a disk: looked for before something large is written, and missed while it is."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from panguq.errors import StorageError

SLACK_BYTES = 1 << 20  # for the folder itself and rounding up to blocks


def check_space(target: Path, needed: int) -> None:
    """Refuse a disk with fewer than `needed` bytes free beside `target`. Raises StorageError."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise StorageError(
            f"{target}: not enough space: {_mib(needed)} needed in {target.parent}, "
            f"{_mib(free)} free",
            "free some space there or choose another disk",
        )


def write_error(target: Path, needed: int, error: OSError) -> StorageError:
    """What the system says of a `target` of `needed` bytes, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(
            f"{target}: the disk is full or a limit was reached ({error.strerror}): "
            f"{_mib(needed)} needed in {target.parent}; nothing was kept",
            "free some space there, raise the limit, or choose another disk",
        )
    return StorageError(f"{target}: cannot be written: {error}", "choose another path")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
