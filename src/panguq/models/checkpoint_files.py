"""The weight files of a transformers checkpoint: looked at first, then read, and no others."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from panguq.errors import InputError, StorageError
from panguq.files.limits import INDEX_BYTES, read_limited
from panguq.files.safetensors_header import count_tensors, refuse_too_many
from panguq.files.strict_json import parse_json
from panguq.tensors.safetensors_files import DTYPES

logger = logging.getLogger("panguq")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}
_WEIGHT_DTYPES = ("F64", "F32", "BF16", "F16")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


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
    missing or truncated, for one that lists more than any model has, and for an index that says
    other than its shards.
    """
    if not (folder / INDEX).is_file():
        file = _single_file(folder)
        count_tensors(file)
        return _tensors_in(file)
    places = _places(folder / INDEX)
    files = [folder / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            raise StorageError(f"{file}: missing, but {INDEX} names it", _AGAIN)
    refuse_too_many(folder, sum(count_tensors(file) for file in files))
    tensors = [tensor for file in files for tensor in _tensors_in(file)]
    _check_index(folder / INDEX, places, tensors)
    return tensors


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with a PEFT adapter, alone or beside a model's weights.

    It would be left out, or joined by a loader that knows of it. Raises InputError.
    """
    found = next((name for name in _ADAPTER if (folder / name).is_file()), None)
    if found is None:
        return
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder}: holds an adapter ({found}), not a model",
            f"load the model that it was trained for with peft, {_MERGE}",
        )
    raise InputError(
        f"{folder}: holds an adapter ({found}) beside the model's weights",
        f"load both with peft, {_MERGE}; or move the adapter's files away, if the model is meant "
        "without it",
    )


def other_files(folder: Path, tensors: list[StoredTensor]) -> list[str]:
    """The safetensors files beside those of `tensors`, such as a single file beside an index.

    They are not read, and a warning says so.
    """
    read = {tensor.file.name for tensor in tensors}
    others = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in read)
    if others and read:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        logger.warning(
            "%s: the weights are read from %s%s, and not from %s%s",
            folder, min(read), f" and {len(read) - 1} more" if len(read) > 1 else "",
            ", ".join(others[:4]), more,
        )  # fmt: skip
    return others


def open_tensors(tensors: list[StoredTensor]) -> dict[str, Tensor]:
    """The tensors themselves by name, memory-mapped."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(tensor.file for tensor in tensors):
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def stored_dtype(tensors: list[StoredTensor]) -> torch.dtype | None:
    """The floating point dtype that most of the weights are stored in; None without any.

    Raises InputError, naming the tensor, for one that is not stored as ordinary floating point
    numbers: 8-bit floats, and integers as weight or bias, mean nothing without their scales.
    """
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.name.endswith((".weight", ".bias")) or tensor.dtype.startswith("F"):
            refuse_unweighted([tensor])
        if tensor.dtype in _FLOATS:
            counts[_FLOATS[tensor.dtype]] += tensor.elements
    return counts.most_common(1)[0][0] if counts else None


def refuse_unweighted(tensors: Iterable[StoredTensor]) -> None:
    """Refuse weights that are not stored as ordinary floating point numbers. Raises InputError."""
    for tensor in tensors:
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise InputError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, which is no dtype of a "
                "float model's weights",
                f"give the float checkpoint ({', '.join(_WEIGHT_DTYPES)}) that it was made from",
            )


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
    data = parse_json(read_limited(index, INDEX_BYTES, _AGAIN), str(index))
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


_MERGE = "merge_and_unload() it, and save_pretrained() the result"


def _is_plain(name: object) -> bool:
    """Whether this is a file's name and no path."""
    if not isinstance(name, str) or "\0" in name or len(name.encode(errors="replace")) > 255:
        return False
    return Path(name).name == name
