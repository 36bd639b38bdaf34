"""The weight files of a transformers checkpoint, looked at before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from panguq.errors import InputError, StorageError
from panguq.strict_json import parse_json
from panguq.weight_files import DTYPES

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}
_WEIGHT_DTYPES = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors header describes it; `dtype` in its words, as in "BF16"."""

    file: Path
    name: str
    dtype: str
    elements: int


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of a checkpoint in safetensors. Only the index and the headers are read.

    Raises InputError if there are no weights; StorageError, naming the file, for a shard that is
    missing or truncated, and for an index that says other than its shards.
    """
    if not (folder / INDEX).is_file():
        return _tensors_in(_single_file(folder))
    places = _places(folder / INDEX)
    files = [folder / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            raise StorageError(f"{file}: missing, but {INDEX} names it", _AGAIN)
    tensors = [tensor for file in files for tensor in _tensors_in(file)]
    _check_index(folder / INDEX, places, tensors)
    return tensors


def stored_dtype(tensors: list[StoredTensor]) -> torch.dtype | None:
    """The floating point dtype that most of the weights are stored in; None without any.

    Raises InputError, naming the tensor, for a weight or bias that is not stored as ordinary
    floating point numbers: integers and 8-bit floats mean nothing without their scales.
    """
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        is_weight = tensor.name.endswith((".weight", ".bias"))
        if is_weight and tensor.dtype not in _WEIGHT_DTYPES:
            raise InputError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, which is no dtype of a "
                "float model's weights",
                f"give the float checkpoint ({', '.join(_WEIGHT_DTYPES)}) that it was made from",
            )
        if tensor.dtype in _FLOATS:
            counts[_FLOATS[tensor.dtype]] += tensor.elements
    return counts.most_common(1)[0][0] if counts else None


def refuse_pointer(path: Path) -> None:
    """Refuse what a clone without Git LFS leaves in place of a large file. Raises StorageError."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise StorageError(
                f"{path}: a Git LFS pointer, not the file itself",
                "fetch it with git lfs pull, or download the file",
            )


def _single_file(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        raise StorageError(f"{folder}: there are shards ({shards[0].name}) but no {INDEX}", _AGAIN)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if others:
        raise InputError(
            f"{folder}: the weights are pickle files ({others[0]}), which can run code",
            "convert them to safetensors",
        )
    raise InputError(f"{folder}: there are no weights", f"put {WEIGHTS} or shards with an index")


def _places(index: Path) -> dict[str, str]:
    data = parse_json(index.read_bytes(), str(index))
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not all(_is_plain(name) for name in names.values()):
        raise StorageError(f"{index}: no weight_map of file names", _AGAIN)
    return names


def _check_index(index: Path, places: Mapping[str, str], tensors: list[StoredTensor]) -> None:
    """Each tensor once, where the index says: loaders differ in which of two they would take."""
    found = {(tensor.name, tensor.file.name) for tensor in tensors}
    absent = sorted(set(places.items()) - found)
    if absent:
        name, file = absent[0]
        raise StorageError(
            f"{index}: says that {name} is in {file}, which does not hold it"
            f" ({len(absent)} such tensors)",
            "index and shards are of two checkpoints; download them again",
        )
    extra = sorted(found - set(places.items()))
    if extra:
        name, file = extra[0]
        said = f"places it in {places[name]}" if name in places else "does not name it"
        raise StorageError(
            f"{index.parent / file}: holds {name}, but {INDEX} {said} ({len(extra)} such tensors)",
            "index and shards are of two checkpoints; download them again",
        )


def _tensors_in(file: Path) -> list[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    refuse_pointer(file)
    found = []
    try:
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                size = torch.Size(part.get_shape()).numel()
                found.append(StoredTensor(file, name, part.get_dtype(), size))
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"{file}: truncated or damaged, cannot be read as safetensors: {error}", _AGAIN
        ) from error
    return found


_POINTER = b"version https://git-lfs.github.com/spec/"
_AGAIN = "the checkpoint is incomplete; download the file again"


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name
