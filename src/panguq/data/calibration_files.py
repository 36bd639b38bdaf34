"""Rows of text out of a file: plain text, JSON lines, JSON or parquet, each perhaps gzipped."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from panguq.data.calibration_tokens import is_message
from panguq.errors import InputError
from panguq.extras import require

logger = logging.getLogger("panguq")

JSON_LINES = (".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv")
_NAMES = (".txt", ".md", ".text", ".json", ".parquet", ".gz", ".arrow", *JSON_LINES, *_TABLES)
_LONGEST_NAME, _LONGEST_WORD = 1024, 64
READABLE = "text, .jsonl, .json or .parquet (text and JSON may be gzipped)"
TEXT_FIELDS = ("text", "content")
CHAT_FIELDS = ("messages", "conversations", "conversation", "chat")
_FIELDS = ("input_ids", "attention_mask", "token_type_ids", *TEXT_FIELDS, *CHAT_FIELDS)

Located = tuple[str, Any]
"""Where a row stands, such as `line 3`, and the row."""


def named_file(data: Any) -> Path | None:
    """The file that `data` names, or None where it is a text or no name at all.

    A path object is a name. So is a one-line string if there is such a file, if it ends as data
    files do, or if it is one ASCII word, with a separator in it or short; whether the file exists
    is not checked.
    """
    if isinstance(data, os.PathLike):
        return Path(os.fspath(data))
    if not isinstance(data, str) or len(data) > _LONGEST_NAME or _is_text(data):
        return None
    path = Path(data).expanduser() if data.startswith("~/") else Path(data)
    return path if _looks_like_name(data) or os.path.exists(path) else None


def is_file_name(text: str) -> bool:
    """Whether a row of text is one word that ends as data files do."""
    return len(text.split()) == 1 and text.lower().endswith(_NAMES)


def _is_text(data: str) -> bool:
    return not data.strip() or "\n" in data.strip() or "\0" in data


def _looks_like_name(data: str) -> bool:
    one_word = len(data.split()) == 1
    bare = data.isascii() and ("/" in data or "\\" in data or len(data) <= _LONGEST_WORD)
    return data.lower().endswith(_NAMES) or (one_word and bare)


def rows_of_file(path: Path, characters: int) -> Iterator[Located]:
    """The rows of a file in order; of a plain text one row, its first `characters` at most.

    A row is a string or a mapping. Raises InputError, naming the file and the line, for what is
    missing, damaged, or of a kind that is not read.
    """
    names = [suffix.lower() for suffix in path.suffixes]
    kind = names[-2] if names[-1:] == [".gz"] and len(names) > 1 else "".join(names[-1:])
    if path.is_dir():
        raise InputError(f"{path}: a folder", f"give a file: {READABLE}")
    if kind in _TABLES:
        raise InputError(
            f"{path}: {kind} files are not read", f"pass its texts as a list, or give {READABLE}"
        )
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind in JSON_LINES:
        return json_lines(path)
    return _json_rows(path) if kind == ".json" else _text_row(path, characters)


def _text_row(path: Path, characters: int) -> Iterator[Located]:
    with _reading(path) as file:
        text = _read(path, file, characters).removeprefix("\ufeff")
    if "\0" in text:
        raise InputError(f"{path}: not text: it holds zero bytes", "save it as UTF-8 text")
    if _is_json_row(text):
        logger.warning(
            "%s is taken as plain text, and looks like JSON lines; name it .jsonl if it is", path
        )
    yield "", text.strip()


def _is_json_row(text: str) -> bool:
    line = text.lstrip().partition("\n")[0]
    try:
        return line.startswith("{") and bool(set(json.loads(line)) & set(_FIELDS))
    except (ValueError, RecursionError):
        return False


def json_lines(path: Path) -> Iterator[Located]:
    """The rows of a file with one JSON value a line, empty lines left out."""
    with _reading(path) as file:
        number = 0
        while line := _read(path, file, None):
            number += 1
            text = line.removeprefix("\ufeff").strip()
            if text:
                yield f"{path}: line {number}", _parsed(text, f"{path}: line {number}")


def _json_rows(path: Path) -> Iterator[Located]:
    """The rows of one JSON value, or of a `.json` file that holds JSON lines."""
    with _reading(path) as file:
        text = _read(path, file, -1).removeprefix("\ufeff").strip()
    head, _, rest = text.partition("\n")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if rest.strip() and _is_json(head):
            yield from json_lines(path)
            return
        value = _parsed(text, str(path))
    if not isinstance(value, list) or (value and is_message(value[0])):
        yield str(path), value
        return
    for index, row in enumerate(value):
        yield f"{path}: row {index}", row


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply", "give rows with a text") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}", "write one JSON object a line") from error


def _parquet_rows(path: Path) -> Iterator[Located]:
    require("pyarrow", f"{path}: a parquet file", "give .jsonl")
    import pyarrow
    from pyarrow import parquet

    if not path.exists():
        raise _missing(path)
    try:
        file = parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if name in _FIELDS]
        if not names:
            raise InputError(
                f"{path}: no column holds text: {', '.join(file.schema_arrow.names)}",
                f"name one of {', '.join((*TEXT_FIELDS, *CHAT_FIELDS))}",
            )
        index = 0
        for batch in file.iter_batches(64, columns=names):
            for row in batch.to_pylist():
                yield f"{path}: row {index}", row
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file: {error}", f"give {READABLE}") from error


def _reading(path: Path) -> IO[str]:
    try:
        if path.suffix.lower() == ".gz":
            path.open("rb").close()  # gzip opens late: what is missing shows here
            return gzip.open(path, "rt", encoding="utf-8")
        return path.open(encoding="utf-8")
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", f"give {READABLE}") from error


def _missing(path: Path) -> InputError:
    return InputError(
        f"{path}: no such file",
        f"give a file: {READABLE}. Data sets are not fetched: load one and pass its rows. "
        "If this is itself the text, pass it in a list",
    )


def _read(path: Path, file: IO[str], characters: int | None) -> str:
    """This many characters (-1: all), or a line for None."""
    try:
        return file.readline() if characters is None else file.read(characters)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason}", f"give {READABLE}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}", f"give {READABLE}") from error
