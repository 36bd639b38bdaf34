"""The list of a folder's files with their sizes and checksums, and reading by it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from panguq.errors import StorageError
from panguq.files.limits import MANIFEST_BYTES, refuse_larger
from panguq.files.strict_json import parse_json

FORMAT = "panguq"
VERSION = 1
MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
SAVE_AGAIN = "the folder is damaged; copy it again or save the model again"
_READ_BYTES = 1 << 20


def manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """The manifest with its own checksum as last entry; there is one spelling of each."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode() + b"\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after a look at its form and its own checksum. Raises StorageError."""
    data = read_regular(path, MANIFEST_BYTES)
    manifest = parse_json(data, str(path))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StorageError(f"{path}: not a compiled model of panguq", "check the path")
    if manifest.get("version") != VERSION:
        raise StorageError(
            f"{path}: format version {manifest.get('version')!s:.40}, but this panguq reads "
            f"{VERSION}",
            "install the version of panguq that saved it, or compile the model again",
        )
    if not _is_well_formed(manifest):
        raise StorageError(f"{path}: entries are missing or of the wrong kind", SAVE_AGAIN)
    if data != manifest_text(manifest):
        raise StorageError(f"{path}: its checksum is wrong: the file was changed", SAVE_AGAIN)
    for name in manifest["files"]:
        if not FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise StorageError(f"{path}: lists {name!r}, which is no plain file name", SAVE_AGAIN)
    return manifest


def _is_well_formed(manifest: Mapping[str, Any]) -> bool:
    kinds = {"format": str, "version": int, "panguq": str, "weights": list, "aliases": dict}
    kinds |= {"files": dict, "sha256": str}
    if {key: type(value) for key, value in manifest.items()} != kinds:
        return False
    return (
        all(_is_file_entry(entry) for entry in manifest["files"].values())
        and all(isinstance(name, str) for name in manifest["aliases"].values())
        and all(isinstance(n, str) and n in manifest["files"] for n in manifest["weights"])
    )


def _is_file_entry(entry: Any) -> bool:
    kinds = {"bytes": int, "sha256": str}
    return isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == kinds


def open_regular(path: Path) -> BinaryIO:
    """The file, if it is one: links and devices may lead anywhere, and pipes never end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise StorageError(f"{path}: missing", SAVE_AGAIN) from None
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise StorageError(f"{path}: cannot be opened: {why}", SAVE_AGAIN) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StorageError(f"{path}: not a regular file", SAVE_AGAIN)
    return os.fdopen(handle, "rb")


def read_regular(path: Path, largest: int) -> bytes:
    """The bytes of a regular file. Raises StorageError for one of more than `largest`."""
    with open_regular(path) as file:
        refuse_larger(path, os.fstat(file.fileno()).st_size, largest, SAVE_AGAIN)
        return file.read(largest)


def check_file(path: Path, size: int, sha256: str | None) -> None:
    """Compare a file with what the manifest says of it. Raises StorageError."""
    with open_regular(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            what = "truncated" if found < size else "longer than saved"
            raise StorageError(f"{path}: {what}: {found} bytes instead of {size}", SAVE_AGAIN)
        if sha256 is None:
            return
        digest = hashlib.sha256()
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise StorageError(f"{path}: its checksum is wrong: the file was changed", SAVE_AGAIN)
