"""The folder of a compiled model: written whole or not at all, checked when it is read.

    manifest.json          format, versions, and size and sha256 of every other file
    weights.safetensors    or weights-00001-of-0000N.safetensors
    …                      what the caller passes: graphs, recipe, interface, tokenizer

A folder is written under a temporary name beside its own, `.<name>.partial-<random>`, and then
renamed. Checksums guard against accidents, not against someone who rewrites the manifest too;
against that, nothing that is read here is executed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from panguq.errors import StorageError
from panguq.files.disk_space import SLACK_BYTES, check_space, write_error
from panguq.files.limits import OWN_BYTES
from panguq.files.manifest import (
    FILE_NAME,
    FORMAT,
    MANIFEST,
    SAVE_AGAIN,
    VERSION,
    check_file,
    manifest_text,
    read_manifest,
    read_regular,
)
from panguq.files.partial_folder import (
    PARTIAL,
    check_no_more,
    is_taken,
    partial_folder,
    replaced_copies,
)
from panguq.files.safetensors_header import count_tensors
from panguq.files.strict_json import parse_json
from panguq.files.whole_file import write_file
from panguq.tensors.safetensors_files import (
    Shard,
    file_of,
    is_weight_file,
    plan_shards,
    read_mapped,
)


def write_folder(
    path: str | Path,
    files: Mapping[str, bytes | str],
    tensors: Mapping[str, Tensor],
    overwrite: bool = False,
    shard_bytes: int = 1 << 30,
) -> None:
    """Write `files` and `tensors` as the folder `path`, atomically.

    With `overwrite`, a folder that panguq wrote before is replaced, and stays as it was until
    the new one is complete. Raises StorageError; then there is no new folder and the old one,
    if any, is untouched.
    """
    target = Path(path).resolve()
    contents = {
        name: text.encode() if isinstance(text, str) else text for name, text in files.items()
    }
    for name in contents:
        if not FILE_NAME.fullmatch(name) or name == MANIFEST or is_weight_file(name):
            raise StorageError(
                f"{name!r} cannot name a file of a compiled model",
                f"use letters, digits, _ . and -; {MANIFEST} and weights belong to panguq",
            )
    shards, aliases = plan_shards(tensors, shard_bytes)
    written = [shard for shard in shards if file_of(shard.tensors) is None]
    needed = sum(map(len, contents.values())) + sum(s.size for s in written) + SLACK_BYTES
    try:
        check_place(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(target, overwrite, _is_model) as folder:
            check_space(target, needed)
            listed = {
                name: write_file(folder / name, [contents[name]]) for name in sorted(contents)
            }
            listed |= {shard.name: _write_shard(folder / shard.name, shard) for shard in shards}
            manifest = _manifest(listed, shards, aliases)
            write_file(folder / MANIFEST, [manifest_text(manifest)])
    except OSError as error:
        raise write_error(target, needed, error) from error


@dataclass(frozen=True)
class Folder:
    """A folder whose files have been checked."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The files in it, without the manifest."""
        return tuple(self.manifest["files"])

    def data(self, name: str) -> bytes:
        """The bytes of a file. Raises StorageError if the folder has no such file."""
        if name not in self.names:
            raise StorageError(f"{self.path / name}: not in this model", SAVE_AGAIN)
        return read_regular(self.path / name, OWN_BYTES)

    def text(self, name: str) -> str:
        """A text file."""
        try:
            return self.data(name).decode()
        except UnicodeDecodeError as error:
            raise StorageError(f"{self.path / name}: not text: {error}", SAVE_AGAIN) from error

    def json(self, name: str) -> Any:
        """A JSON file's value."""
        return parse_json(self.data(name), str(self.path / name))

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name, memory-mapped."""
        found: dict[str, Tensor] = {}
        for name in self.manifest["weights"]:
            count_tensors(self.path / name)
            found |= read_mapped(self.path / name)
        for alias, name in self.manifest["aliases"].items():
            if name not in found:
                raise StorageError(
                    f"{self.path / MANIFEST}: {alias} stands for {name}, which is no weight",
                    SAVE_AGAIN,
                )
            found[alias] = found[name]
        return dict(sorted(found.items()))


def read_folder(path: str | Path, verify: bool = True) -> Folder:
    """Open a folder that `write_folder` wrote; `verify` compares every checksum.

    Raises StorageError, naming the file, for anything missing, damaged or from elsewhere.
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        kept = replaced_copies(folder)
        hint = f"an interrupted save left the old one as {kept[0]}; rename it" if kept else ""
        raise StorageError(f"{folder}: no such folder", hint or "check the path")
    if PARTIAL.fullmatch(folder.name):
        raise StorageError(f"{folder}: a save that was interrupted", "delete it and save again")
    manifest = read_manifest(folder / MANIFEST)
    for name, entry in manifest["files"].items():
        check_file(folder / name, entry["bytes"], entry["sha256"] if verify else None)
    return Folder(folder, manifest)


# --- writing ----------------------------------------------------------------------------------


def check_place(target: Path, overwrite: bool) -> None:
    """Refuse a place where `write_folder` would not write. Raises StorageError."""
    if not is_taken(target, overwrite):
        return
    try:
        manifest = read_manifest(target / MANIFEST)
    except StorageError as error:
        raise StorageError(
            f"{target} was not written by panguq, so it is not overwritten ({error.message})",
            "choose another path, or delete the folder yourself",
        ) from error
    check_no_more(target, {MANIFEST, *manifest["files"]})


def _is_model(folder: Path) -> bool:
    try:
        check_place(folder, overwrite=True)
    except StorageError:
        return False
    return (folder / MANIFEST).is_file()


def _write_shard(path: Path, shard: Shard) -> dict[str, int | str]:
    """Write a file of weights; where the same bytes are in a file already, give that a second name.

    Raises OSError.
    """
    source = file_of(shard.tensors)
    if source is None:
        return write_file(path, shard.chunks())
    with open(source, "rb") as file:
        same = file.read(len(shard.header)) == shard.header
        same = same and os.fstat(file.fileno()).st_size == shard.size
        if not same or not _link(source, path):
            return write_file(path, shard.chunks())
        file.seek(0)
        digest = hashlib.sha256()
        while chunk := file.read(8 << 20):
            digest.update(chunk)
        os.fsync(file.fileno())
    return {"bytes": shard.size, "sha256": digest.hexdigest()}


def _link(source: Path, path: Path) -> bool:
    """Whether the file could be given this second name; other disks, and some kinds, cannot."""
    try:
        os.link(source, path)
    except OSError:
        return False
    return True


def _manifest(
    listed: Mapping[str, dict[str, int | str]], shards: Iterable[Shard], aliases: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "panguq": version("panguq"),
        "weights": [shard.name for shard in shards],
        "aliases": dict(aliases),
        "files": dict(listed),
    }
