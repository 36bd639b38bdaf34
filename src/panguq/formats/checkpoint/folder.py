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
from panguq.files.limits import CONFIG_BYTES, read_limited
from panguq.files.partial_folder import check_name, partial_folder
from panguq.files.strict_json import parse_json
from panguq.formats.own.storage import (
    SLACK_BYTES,
    check_no_more,
    check_space,
    write_error,
    write_file,
)
from panguq.tensors.safetensors_files import DTYPES

CONFIG = "config.json"
MARK = "panguq"
"""The key of config.json that says who wrote a checkpoint; loaders keep and ignore it."""
SHARD_BYTES = 5 * 10**9
_CHUNK_BYTES = 64 << 20


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
        check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target, needed)
        with partial_folder(target, overwrite, _is_ours) as folder:
            digests = {}
            for name, group in zip(names, groups, strict=True):
                digests[name] = _write_safetensors(folder / name, {k: tensors[k] for k in group})
            for name in sorted(texts):
                digests[name] = write_file(folder / name, [texts[name]])["sha256"]
            sums = {name: str(digest) for name, digest in digests.items()}
            write_file(folder / CHECKSUMS, [checksums_text(sums)])
    except OSError as error:
        raise write_error(target, needed, error) from error


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a place where `write_checkpoint` would not write. Raises StorageError."""
    if not target.name:
        raise StorageError(f"{target} cannot be replaced", "name a folder in it")
    check_name(target)
    if not target.exists():
        return
    if not overwrite:
        raise StorageError(f"{target} already exists", "choose another, or pass overwrite=True")
    if not target.is_dir():
        raise StorageError(f"{target} is a file", "choose another path")
    if not any(target.iterdir()):
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
    return json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"


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
        check_target(folder, overwrite=True)
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


def _write_safetensors(path: Path, tensors: Mapping[str, Output]) -> int | str:
    """Wide dtypes first, as safetensors itself writes, so that every tensor is aligned.

    Returns the sha256 of the file.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, output in ordered:
        end = offset + output.nbytes
        header[name] = {
            "dtype": DTYPES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    outputs = (output for _, output in ordered)
    return write_file(path, _chunks(len(text).to_bytes(8, "little") + text, outputs))["sha256"]


def _chunks(header: bytes, outputs: Iterable[Output]) -> Iterator[bytes | memoryview]:
    yield header
    for output in outputs:
        yield from _bytes_of(output)
        yield b""  # the writer lets go of this tensor before the next one is made


def _bytes_of(output: Output) -> Iterator[memoryview]:
    tensor = output.make()
    assert tensor.dtype == output.dtype
    assert tuple(tensor.shape) == output.shape
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for chunk in flat.split(_CHUNK_BYTES) if flat.numel() else ():
        yield memoryview(chunk.numpy())
