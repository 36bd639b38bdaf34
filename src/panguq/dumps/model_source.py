"""The weights that a dump need not hold: the folder that the model came from has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panguq.dumps.files import (
    ModelSource,
    SourceTensor,
    read_tensors,
    tensor_names,
)
from panguq.errors import StorageError
from panguq.ir.text.printer import content_hash
from panguq.ir.text.value_types import DTYPES
from panguq.tensors.dtypes import dtype_name


def find_source(
    model: Any, weights: Mapping[str, Tensor], hashes: Mapping[str, str]
) -> ModelSource | None:
    """The model's own folder and those of `weights` that it holds with equal values.

    None if the model names no local folder with safetensors, or none of its tensors is equal.
    """
    folder = Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or "."))
    if folder == Path(".") or not folder.is_dir():
        return None
    places = _places(folder)
    found: dict[str, SourceTensor] = {}
    for name, weight in weights.items():
        same_shape = places.get(tuple(weight.shape), {})
        for key in sorted(same_shape, key=lambda key: key != name):  # its own name first
            if _equal(same_shape[key], weight):
                entry = SourceTensor(name=key, dtype=dtype_name(weight.dtype))
                found[hashes[name]] = entry
                break
    return ModelSource(path=str(folder.resolve()), tensors=found) if found else None


def _places(folder: Path) -> dict[tuple[int, ...], dict[str, Tensor]]:
    """The folder's tensors, memory-mapped: by shape, then by name."""
    found: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors = read_tensors(path)
        except StorageError:  # a file that cannot be read holds nothing that can be left out
            continue
        for name, tensor in tensors.items():
            found.setdefault(tuple(tensor.shape), {})[name] = tensor
    return found


def _equal(stored: Tensor, weight: Tensor) -> bool:
    """Equal as the weight's dtype; the first few values tell most others apart."""
    few = slice(0, 64)
    first = stored.reshape(-1)[few].to(weight.dtype)
    return torch.equal(first, weight.reshape(-1)[few]) and torch.equal(
        stored.to(weight.dtype), weight
    )


class SourceFolder:
    """A model's folder, from which weights are read back and checked by their hash."""

    def __init__(self, source: ModelSource, folder: Path | None = None) -> None:
        self.source = source
        self.folder = folder or Path(source.path)
        self._files: dict[str, Path] | None = None

    def tensor(self, wanted: str) -> Tensor:
        """The weight with this content hash. Raises StorageError."""
        entry = self.source.tensors[wanted]
        if entry.name not in self._by_name() or entry.dtype not in DTYPES:
            raise StorageError(
                f"the dump needs weight {entry.name} of the model's folder {self.folder}, which "
                "is not there",
                "name the folder where the model lies now",
            )
        path = self._by_name()[entry.name]
        tensor = read_tensors(path, [entry.name])[entry.name].to(DTYPES[entry.dtype])
        if content_hash(tensor) != wanted:
            raise StorageError(
                f"{path}: weight {entry.name} is not the one that was compiled",
                "the model's folder was changed, or it is another model's",
            )
        return tensor

    def _by_name(self) -> dict[str, Path]:
        if self._files is None:
            paths = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
            self._files = {name: path for path in paths for name in tensor_names(path)}
        return self._files
