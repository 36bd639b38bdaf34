"""An ONNX model on disk: one file, or two where the weights are large, whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from onnx import TensorProto
from torch import Tensor

from panguq.errors import StorageError
from panguq.files.disk_space import check_space, write_error
from panguq.files.partial_folder import check_name
from panguq.files.whole_file import write_file
from panguq.formats.onnx.builder import Weight
from panguq.formats.onnx.model import OnnxGraph

INLINE_BYTES = 64 << 20  # a model of more bytes of weights keeps them in a file beside it
SMALL_BYTES = 1 << 10  # a tensor of fewer stays in the model in any case
ALIGNMENT = 4096  # of tensors in the file beside it, so that they can be mapped


def write_onnx(
    graph: OnnxGraph, path: Path, overwrite: bool = False, inline_bytes: int = INLINE_BYTES
) -> None:
    """Write the model as `path`, and weights beyond `inline_bytes` as `<path>.data` beside it.

    Both appear under their names when they are complete. One weight at a time is in memory.
    Raises StorageError if one of them exists (unless `overwrite`) or cannot be written.
    """
    data = path.with_name(f"{path.name}.data")
    check_free(path, overwrite)
    total = sum(weight.nbytes for weight in graph.weights)
    outside = [w for w in graph.weights if total > inline_bytes and w.nbytes > SMALL_BYTES]
    names = {weight.name for weight in outside}
    del graph.model.graph.initializer[:]
    offset = 0
    for weight in graph.weights:
        tensor = graph.model.graph.initializer.add()
        tensor.name, tensor.data_type = weight.name, weight.elem_type
        tensor.dims.extend(weight.shape)
        if weight.name in names:
            _refer(tensor, data.name, offset, weight.nbytes)
            offset += _padded(weight.nbytes)
        else:
            tensor.raw_data = bytes(_bytes_of(weight))
    needed = offset + total
    token = secrets.token_hex(4)
    partial = [target.with_name(f".{target.name}.partial-{token}") for target in (path, data)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(path, needed)
        if outside:
            write_file(partial[1], _padded_weights(outside))
        write_file(partial[0], [graph.model.SerializeToString()])
        _into_place(partial, [path, data], bool(outside))
    except OSError as error:
        raise write_error(path, needed, error) from error
    finally:
        for file in partial:
            file.unlink(missing_ok=True)


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a place where nothing would be written. Raises StorageError.

    `overwrite` is for the file that is named, and for the one beside it as a part of that. One that
    stands alone is no part of anything.
    """
    if not path.name or path.is_dir():
        raise StorageError(f"{path} is a folder", "name a file, as in model.onnx")
    check_name(path.with_name(f"{path.name}.data"))
    data = path.with_name(f"{path.name}.data")
    for target in (path, data):
        if os.path.lexists(target) and not overwrite:
            raise StorageError(
                f"{target} already exists", "choose another, or pass overwrite=True (--force)"
            )
    if os.path.lexists(data) and not path.exists():
        raise StorageError(
            f"{data} is there without {path.name}, so it is not overwritten",
            "choose another path, or delete it yourself",
        )


def _refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes_of(weight: Weight) -> memoryview:
    tensor: Tensor = weight.make().detach().contiguous()
    flat = tensor.reshape(-1).view(torch.uint8)
    if flat.numel() != weight.nbytes:
        raise StorageError(
            f"weight {weight.name} has {flat.numel()} bytes, its type says {weight.nbytes}",
            "this is a defect of an emitter in panguq/formats/onnx",
        )
    return flat.numpy().data


def _padded_weights(weights: Sequence[Weight]) -> Iterator[bytes | memoryview]:
    for weight in weights:
        yield _bytes_of(weight)
        yield b"\0" * (_padded(weight.nbytes) - weight.nbytes)


def _into_place(partial: list[Path], targets: list[Path], has_data: bool) -> None:
    """The data first: a model that is there is complete. An old model goes before its data does."""
    path, data = targets
    path.unlink(missing_ok=True)
    if has_data:
        os.replace(partial[1], data)
    else:
        data.unlink(missing_ok=True)
    os.replace(partial[0], path)
