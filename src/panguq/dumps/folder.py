"""The folder that a dump is written into: new, empty, or an old dump that may go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from panguq.dumps.files import DUMP_JSON, PROBE, STAGE_NAME, SUMMARY, DumpInfo, read_json_as
from panguq.errors import StorageError
from panguq.files.checksums import CHECKSUMS
from panguq.files.claimed_folder import lock_folder
from panguq.files.partial_folder import MARKER, PARTIAL

_STAGE_FILE = re.compile(
    r"[A-Za-z0-9_.-]+\.csv|graph\.(txt|diff|json)|stage\.json|error\.txt"
    r"|(tensors|calibration|metadata)\.safetensors|\.[a-z.]+\.partial-[0-9a-f]{8}"
    rf"|{MARKER}|{CHECKSUMS}"
)


def check_dump_folder(target: Path) -> None:
    """Raises StorageError unless `target` is new, empty, or an old dump and nothing else."""
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target} is a file", "name a folder for the dump")
    entries = sorted(target.iterdir()) if target.exists() else []
    foreign = next((path for path in entries if not _is_ours(path)), None)
    if foreign is None and entries and not _is_dump(target):
        foreign = entries[0]
    if foreign is not None:
        raise StorageError(
            f"{target} is not empty and {foreign.name} in it is not part of a dump",
            "choose a new folder; only an old dump is replaced",
        )


def prepare_folder(target: Path) -> int:
    """Make `target` an empty folder and hold it. Only an old dump is ever deleted, nothing else.

    Returns a handle that keeps other dumps out until it is closed. Raises StorageError if it is a
    file, holds what no dump holds, cannot be written, or another compile is dumping there.
    """
    try:
        check_dump_folder(target)
        target.mkdir(parents=True, exist_ok=True)
        handle = lock_folder(target)
        if handle is None:
            raise StorageError(f"{target}: another compile is dumping there", "choose another one")
        check_dump_folder(target)
        for path in sorted(target.iterdir()):
            if path.name != DUMP_JSON:  # it stays, so that a kill here leaves a dump, too
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return handle
    except OSError as error:
        raise StorageError(
            f"{target}: cannot hold a dump: {error.strerror}", "choose another folder"
        ) from error


def _is_dump(target: Path) -> bool:
    try:
        read_json_as(target / DUMP_JSON, DumpInfo)
    except StorageError:
        return False
    return True


def _is_ours(path: Path) -> bool:
    if path.is_symlink():
        return False
    partial = PARTIAL.fullmatch(path.name)
    name = partial["name"] if partial else path.name
    if path.is_file():
        return name in (SUMMARY, DUMP_JSON, PROBE, CHECKSUMS)
    return bool(STAGE_NAME.fullmatch(name)) and all(
        file.is_file() and not file.is_symlink() and _STAGE_FILE.fullmatch(file.name)
        for file in path.iterdir()
    )
