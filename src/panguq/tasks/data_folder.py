"""The user's folder of task data: which files there are to be, and that they are those.

`sources.json` says where each set is published and its sha256. Nothing is downloaded, and panguq
ships no set: their licences differ. A text for perplexity may be any; its hash is in the protocol.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

from panguq.errors import InputError, StorageError
from panguq.files.checksums import sha256_of

TaskRow = dict[str, Any]


@functools.cache
def sources() -> dict[str, dict[str, Any]]:
    """By file name: `sha256` (None: any text) and `where` the set is published."""
    text = resources.files("panguq.tasks").joinpath("sources.json").read_text("utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def data_file(folder: Path | None, name: str) -> Path:
    """The path of a set in the user's folder.

    Raises InputError, which says where to get it, if it is not there.
    """
    where = sources().get(name, {}).get("where", f"write it as {name}")
    if folder is None:
        raise InputError(f"the task reads {name}, and no --data was given", f"get it: {where}")
    if not (folder / name).exists():
        raise InputError(f"{folder / name}: not there", f"get it: {where}")
    return folder / name


@functools.cache
def data_hash(path: Path) -> str:
    """The sha256 of a file; of a folder, that of its CSV files' checksums by name."""
    if not path.is_dir():
        return sha256_of(path.resolve())
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.csv")):
        digest.update(
            f"{sha256_of(file.resolve())}  {file.relative_to(path).as_posix()}\n".encode()
        )
    return digest.hexdigest()


def checked_file(folder: Path | None, name: str) -> tuple[Path, str]:
    """A set's path and sha256. Raises InputError if it is missing or is another than expected."""
    path = data_file(folder, name)
    found, source = data_hash(path), sources().get(name, {})
    if source.get("sha256") not in (None, found):
        raise InputError(
            f"{path}: the sha256 is {found[:16]}…, not {source['sha256'][:16]}…: another version "
            "of the set, or a damaged one",
            f"get it again: {source['where']}",
        )
    return path, found


def json_rows(path: Path) -> list[TaskRow]:
    """The objects of a .jsonl file. Raises StorageError, naming the line that is none."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise StorageError(
                    f"{path}: line {number}: {error}", "get the file again"
                ) from None
            if not isinstance(row, dict):
                raise StorageError(f"{path}: line {number} is no object", "get the file again")
            rows.append(row)
    if not rows:
        raise StorageError(f"{path}: holds no rows", "get the file again")
    return rows


def csv_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file. Raises StorageError for one that is none."""
    try:
        return list(csv.reader(io.StringIO(_text(path), newline="")))
    except csv.Error as error:
        raise StorageError(f"{path}: {error}", "get the file again") from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read: {error}", "get the file again") from error
