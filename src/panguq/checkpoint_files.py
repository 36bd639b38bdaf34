"""The weight files of a transformers checkpoint, looked at before anything is loaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from panguq.errors import InputError, StorageError
from panguq.strict_json import parse_json
from panguq.weight_files import DTYPES

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises InputError if there are none, StorageError if one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        index = parse_json((folder / INDEX).read_bytes(), str(folder / INDEX))
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(_is_plain(name) for name in names.values()):
            raise StorageError(f"{folder / INDEX}: no weight_map of file names", _AGAIN)
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if not file.is_file():
                raise StorageError(f"{file}: missing, but {INDEX} names it", _AGAIN)
        return files
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if others:
        raise InputError(
            f"{folder}: the weights are pickle files ({others[0]}), which can run code",
            "convert them to safetensors",
        )
    raise InputError(f"{folder}: there are no weights", f"put {WEIGHTS} or shards with an index")


def stored_dtype(files: list[Path]) -> torch.dtype | None:
    """The floating point dtype that most of the weights are stored in; None without any.

    Only headers are read. Raises StorageError, naming the file, for one that is truncated.
    """
    from safetensors import SafetensorError, safe_open

    names = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}
    counts: Counter[torch.dtype] = Counter()
    for file in files:
        try:
            with safe_open(str(file), framework="pt", device="cpu") as opened:
                for key in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(key)
                    if part.get_dtype() in names:
                        size = torch.Size(part.get_shape()).numel()
                        counts[names[part.get_dtype()]] += size
        except (SafetensorError, OSError) as error:
            raise StorageError(
                f"{file}: truncated or damaged, cannot be read as safetensors: {error}", _AGAIN
            ) from error
    return counts.most_common(1)[0][0] if counts else None


_AGAIN = "the checkpoint is incomplete; download the file again"


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name
