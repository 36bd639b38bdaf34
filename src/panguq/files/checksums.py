"""SHA256SUMS: the checksums of a folder's other files, in the words of `sha256sum`.

    9f86d081…  config.json
    2c26b46b…  model.safetensors

`sha256sum -c SHA256SUMS` reads it without panguq, and no loader of models does: they ask for files
by name, or for `*.safetensors`, `*.bin` and `*.json`. It guards against accidents, not against
someone who rewrites it, too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from panguq.errors import StorageError
from panguq.files.manifest import FILE_NAME, open_regular
from panguq.files.whole_file import write_file

CHECKSUMS = "SHA256SUMS"
_LINE = re.compile(rf"([0-9a-f]{{64}})  ({FILE_NAME.pattern})")
_LARGEST = 1 << 20  # bytes; a line of a shard has about 100
_READ_BYTES = 1 << 20


def checksums_text(digests: Mapping[str, str]) -> bytes:
    """The list: sha256 in hex by file name, sorted by name."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def read_checksums(folder: Path) -> dict[str, str] | None:
    """sha256 by file name; None where there is no list. Raises StorageError for a damaged one."""
    path = folder / CHECKSUMS
    if not path.exists() and not path.is_symlink():
        return None
    with open_regular(path) as file:
        data = file.read(_LARGEST + 1)
    lines = data.decode(errors="replace").splitlines()
    found = {match[2]: match[1] for match in map(_LINE.fullmatch, lines) if match}
    if data != checksums_text(found):  # there is one spelling of each list
        raise StorageError(f"{path}: it is damaged or not panguq's", "copy the folder again")
    return found


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write the list for these files of the folder. Raises OSError."""
    digests = {name: sha256_of(folder / name) for name in names}
    write_file(folder / CHECKSUMS, [checksums_text(digests)])


def check_listed(folder: Path) -> None:
    """Compare the folder's files with its list, if it has one. Raises StorageError for a file that
    was changed or lost, and OSError."""
    for name, digest in (read_checksums(folder) or {}).items():
        if sha256_of(folder / name) != digest:
            raise StorageError(f"{folder / name}: its checksum is wrong: it was changed")


def sha256_of(path: Path) -> str:
    """The checksum of a regular file. Raises StorageError for what is none, and OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
