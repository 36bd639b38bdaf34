"""Whether a folder's files are still what was written, where SHA256SUMS says what that was."""

from __future__ import annotations

from collections.abc import Iterator

from panguq.check.files import ALL, TEXTS, CheckedFolder, Hit, Rule
from panguq.errors import StorageError
from panguq.files.checksums import CHECKSUMS, read_checksums, sha256_of
from panguq.files.limits import TOKENIZER_BYTES

UNKNOWN = (
    f"bytes: there is no {CHECKSUMS}, as in folders of other tools: whether weights, tokenizer and "
    "configurations are still what was written cannot be known"
)
UNCHANGED = f"bytes: every file is as {CHECKSUMS} says that it was written"
_READ_BY_LOADERS = frozenset({
    ".bin", ".bpe", ".gguf", ".jinja", ".json", ".model", ".pt", ".pth", ".py", ".safetensors",
    ".tiktoken", ".txt", ".vocab",
})  # fmt: skip


def _changed_file(folder: CheckedFolder) -> Iterator[Hit]:
    try:
        listed = read_checksums(folder.path)
    except (StorageError, OSError) as error:
        yield Hit(CHECKSUMS, f"cannot be read: {_why(error)}")
        return
    if listed is None:
        if CHECKSUMS in _files_in_mark(folder):
            yield Hit(CHECKSUMS, "missing, and panguq wrote one: nothing here is vouched for")
        return
    for name, digest in listed.items():
        path = folder.path / name
        try:
            if path.suffix in TEXTS and path.stat().st_size > TOKENIZER_BYTES:
                continue  # said already, and not worth the minutes
            found = sha256_of(path)
        except (StorageError, OSError) as error:
            yield Hit(name, f"{CHECKSUMS} lists it: {_why(error)}")
            continue
        if found != digest:
            yield Hit(
                name, f"changed since it was written: its checksum is not that in {CHECKSUMS}"
            )
    for path in sorted(folder.path.iterdir()):
        is_read = path.suffix in _READ_BY_LOADERS or path.is_dir()
        if is_read and path.name not in listed:
            yield Hit(path.name, f"added later: it is not in {CHECKSUMS}, and loaders may read it")


def _files_in_mark(folder: CheckedFolder) -> list[object]:
    mark = (folder.config or {}).get("panguq")
    files = mark.get("files") if isinstance(mark, dict) else None
    return files if isinstance(files, list) else []


def _why(error: StorageError | OSError) -> str:
    return error.message if isinstance(error, StorageError) else str(error)


UNCHANGED_RULES = (Rule("changed-file", ALL, _changed_file),)
