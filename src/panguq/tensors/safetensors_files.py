"""Weights in safetensors files: written one tensor at a time, read as memory maps.

Tensors that share all their memory (tied embeddings) are written once; the other names become
aliases. The files' bytes depend only on names and values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from panguq.errors import StorageError
from panguq.files.whole_file import write_file
from panguq.tensors.folded_weight import FoldedWeight, materialized

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_NAMES = {name: dtype for dtype, name in DTYPES.items()}
_CHUNK_BYTES = 64 << 20
ALIGNMENT_BYTES = 64
ALONE_BYTES = 4 << 20
"""In a model of more than one file, a tensor of this size has one of its own."""


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, its header, and its tensors in file order."""

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes in order. At most one tensor is copied at a time."""
        yield memoryview(self.header)
        for tensor in self.tensors:
            yield from byte_chunks(materialized(tensor))


class TensorForm(Protocol):
    """A tensor, or what one will be when its turn to be written comes."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def header_of(tensors: Mapping[str, TensorForm]) -> tuple[bytes, list[str]]:
    """A safetensors file's bytes before its first tensor, and the names in the file's order.

    Tensors of whole lines of a processor's cache come first, each at the begin of one: kernels that
    load such lines would copy a mapped weight at every call otherwise. Among the others wide dtypes
    come first, as safetensors itself writes, so that every tensor is aligned.
    """

    def place(name: str) -> tuple[bool, int, str]:
        tensor = tensors[name]
        return tensor.nbytes % ALIGNMENT_BYTES != 0, -tensor.dtype.itemsize, name

    names = sorted(tensors, key=place)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        offsets = [offset, offset + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text, names


def byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes, row by row, some MiB at a time."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for chunk in flat.split(_CHUNK_BYTES) if flat.numel() else ():
        yield memoryview(chunk.numpy())


def plan_shards(
    tensors: Mapping[str, Tensor], shard_bytes: int
) -> tuple[list[Shard], dict[str, str]]:
    """The files that hold these tensors, each below `shard_bytes` where a tensor allows it.

    One file if all fit. Else tensors of `ALONE_BYTES` and more have a file each: what a compile has
    written already then need not be copied.
    Second, the aliases: names whose tensor is stored under another name. Raises StorageError
    for a tensor that has no bytes to write, or a dtype that safetensors does not know.
    """
    stored, aliases = _without_duplicates(tensors)
    total = sum(tensor.nbytes for tensor in stored.values())
    limit = ALONE_BYTES if total > shard_bytes else shard_bytes + 1
    alone = [name for name, tensor in stored.items() if tensor.nbytes >= limit]
    groups: list[list[str]] = []
    size = 0
    for name in [name for name in stored if name not in set(alone)]:
        if not groups or size + stored[name].nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += stored[name].nbytes
    groups += [[name] for name in alone]
    shards = [
        _shard(_file_name(index, len(groups)), {name: stored[name] for name in group})
        for index, group in enumerate(groups)
    ]
    return shards, aliases


def is_weight_file(name: str) -> bool:
    """Whether this is a name that weights are stored under."""
    return name.startswith("weights") and name.endswith(".safetensors")


def read_mapped(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped: pages are read on use and need no swap space.

    Raises StorageError if it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"{path}: cannot be read as safetensors: {error}", "save the model again"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file; returns its sha256. Raises OSError."""
    return str(write_file(path, _shard(path.name, tensors).chunks())["sha256"])


def read_alone(path: Path, name: str) -> Tensor:
    """The only tensor of a file of `write_tensors`, as a map shared with the file.

    The file must be writable; `file_of` tells it later. Raises ValueError, KeyError or OSError.
    """
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    entry = json.loads(header)[name]
    start, dtype = 8 + len(header), _DTYPE_NAMES[entry["dtype"]]
    size = path.stat().st_size
    if size != start + entry["data_offsets"][1]:
        raise ValueError(f"{path} has {size} bytes")
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size)
    data = torch.empty(0, dtype=torch.uint8).set_(storage)[start:]  # type: ignore[arg-type]
    tensor = data.view(dtype).view(entry["shape"])
    tensor.file = path  # type: ignore[attr-defined]
    return tensor


def file_of(tensors: Sequence[Tensor]) -> Path | None:
    """The file that holds exactly this one tensor, if `read_alone` read it from there."""
    path = getattr(tensors[0], "file", None) if len(tensors) == 1 else None
    return path if isinstance(path, Path) and path.is_file() else None


def _without_duplicates(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise StorageError(
                f"cannot save tensor {name}: {tensor.dtype}, {tensor.layout}, on {tensor.device}",
                "weights are dense tensors with values, of float, integer or bool dtype",
            )
        if isinstance(tensor, FoldedWeight):  # has no bytes of its own until it is written
            stored[name] = tensor
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise StorageError(
                f"cannot save tensor {name}: it is a {type(tensor).__name__}",
                "fake tensors have no values; compile a model whose weights are loaded",
            )
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        stored[name] = tensor
    return stored, aliases


def _file_name(index: int, count: int) -> str:
    if count == 1:
        return "weights.safetensors"
    return f"weights-{index + 1:05}-of-{count:05}.safetensors"


def _shard(name: str, tensors: Mapping[str, Tensor]) -> Shard:
    header, names = header_of(tensors)
    return Shard(name, header, tuple(tensors[key] for key in names))
