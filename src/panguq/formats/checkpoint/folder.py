"""A checkpoint's folder: safetensors under the names that loaders look for, whole or not there.

Tensors are made one at a time while they are written, so that a checkpoint needs no memory of its
own. The folder appears under its name only when it is complete; SHA256SUMS in it, which loaders
ignore, lists the checksums of all its other files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panguq.errors import StorageError
from panguq.files.checksums import CHECKSUMS, checksums_text
from panguq.files.disk_space import SLACK_BYTES, check_space, write_error
from panguq.files.limits import CONFIG_BYTES, read_limited
from panguq.files.partial_folder import check_no_more, is_taken, partial_folder
from panguq.files.strict_json import json_text, parse_json
from panguq.files.whole_file import write_file
from panguq.tensors.safetensors_files import byte_chunks, header_of

CONFIG = "config.json"
MARK = "panguq"
"""The key of config.json that says who wrote a checkpoint; loaders keep and ignore it."""
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Output:
    """A tensor to be written: its form, and how to make it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Output:
        """A tensor that exists already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def marked(config: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """The config with a note of what wrote the checkpoint."""
    return {**config, MARK: {"version": version("panguq"), "recipe": recipe}}


def write_checkpoint(
    path: str | Path,
    files: Mapping[str, bytes | str],
    tensors: Mapping[str, Output],
    overwrite: bool = False,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `files` (config.json among them, see `marked`) and `tensors` as the folder `path`.

    One file `<stem>.safetensors`, or shards of at most `shard_bytes` (a tensor is never cut) with
    `<stem>.safetensors.index.json`. With `overwrite`, a checkpoint that panguq wrote is replaced,
    and stays as it was until the new one is complete. Raises StorageError for a place that is
    taken or cannot be written; then there is no new folder and an old one is untouched.
    """
    target = Path(path).resolve()
    groups = _shards(tensors, shard_bytes)
    names = [_shard_name(stem, index, len(groups)) for index in range(len(groups))]
    texts = {name: t.encode() if isinstance(t, str) else t for name, t in files.items()}
    if len(groups) > 1:
        texts[f"{stem}.safetensors.index.json"] = _index(groups, names, tensors)
    if CONFIG in texts:
        texts[CONFIG] = _with_files(texts[CONFIG], [*texts, *names, CHECKSUMS])
    needed = sum(map(len, texts.values())) + sum(t.nbytes for t in tensors.values()) + SLACK_BYTES
    try:
        check_place(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target, needed)
        with partial_folder(target, overwrite, _is_ours) as folder:
            digests = {}
            for name, group in zip(names, groups, strict=True):
                chunks = _chunks({key: tensors[key] for key in group})
                digests[name] = write_file(folder / name, chunks)["sha256"]
            for name in sorted(texts):
                digests[name] = write_file(folder / name, [texts[name]])["sha256"]
            sums = {name: str(digest) for name, digest in digests.items()}
            write_file(folder / CHECKSUMS, [checksums_text(sums)])
    except OSError as error:
        raise write_error(target, needed, error) from error


def check_place(target: Path, overwrite: bool) -> None:
    """Refuse a place where `write_checkpoint` would not write. Raises StorageError."""
    if not is_taken(target, overwrite):
        return
    written = _written(target)
    if not written:
        raise StorageError(
            f"{target} is no checkpoint that panguq wrote, so it is not overwritten",
            "choose another path, or delete the folder yourself",
        )
    check_no_more(target, written)


def _with_files(config: bytes, names: Iterable[str]) -> bytes:
    """The text of a marked config.json with the names of all files in its mark."""
    data = json.loads(config)
    if MARK not in data:
        return config
    data[MARK] = {"files": sorted(names), **data[MARK]}
    return json_text(data).encode()


def _written(target: Path) -> set[str]:
    """The files that the mark of a checkpoint lists; none if it carries no mark."""
    if not (target / CONFIG).is_file():
        return set()
    try:
        config = parse_json(read_limited(target / CONFIG, CONFIG_BYTES), str(target / CONFIG))
    except StorageError:
        return set()
    mark = config.get(MARK) if isinstance(config, dict) else None
    files = mark.get("files") if isinstance(mark, dict) else None
    if not isinstance(files, list):
        return set()
    return {name for name in files if isinstance(name, str)}


def _is_ours(folder: Path) -> bool:
    try:
        check_place(folder, overwrite=True)
    except StorageError:
        return False
    return (folder / CONFIG).is_file()


# --- safetensors --------------------------------------------------------------------------------


def _shards(tensors: Mapping[str, Output], shard_bytes: int) -> list[list[str]]:
    """Names in the order given, cut where a file would grow too large."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return groups


def _shard_name(stem: str, index: int, count: int) -> str:
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{index + 1:05}-of-{count:05}.safetensors"


def _index(groups: list[list[str]], names: list[str], tensors: Mapping[str, Output]) -> bytes:
    places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"


def _chunks(tensors: Mapping[str, Output]) -> Iterator[bytes | memoryview]:
    """A file's bytes in order. One tensor at a time is made."""
    header, names = header_of(tensors)
    yield header
    for name in names:
        yield from _bytes_of(tensors[name])
        yield b""  # the writer lets go of this tensor before the next one is made


def _bytes_of(output: Output) -> Iterator[memoryview]:
    tensor = output.make()
    assert tensor.dtype == output.dtype
    assert tuple(tensor.shape) == output.shape
    return byte_chunks(tensor)
