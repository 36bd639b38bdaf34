"""Local model folders in transformers' format: nothing is downloaded, no code of theirs is run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from panguq.errors import InputError, PanguqError, StorageError
from panguq.files.limits import CONFIG_BYTES, read_limited
from panguq.files.strict_json import parse_json
from panguq.models.architectures import SERVED, config_classes, model_class
from panguq.models.checkpoint_files import (
    CONFIG,
    StoredTensor,
    other_files,
    refuse_adapter,
    stored_dtype,
    stored_tensors,
)
from panguq.models.config import (
    build_config,
    build_generation_config,
    first_lines,
    read_object,
)
from panguq.models.gguf.tokenizer import read_gguf_tokenizer
from panguq.models.gguf.weights import find_gguf, gguf_config, load_gguf
from panguq.models.load_weights import load_weights, name_groups
from panguq.models.openpangu import config as openpangu_config
from panguq.models.openpangu.chat import chat_inputs, chat_prompt, split_thinking
from panguq.models.packed_floats import PackedFloats, packed_weights
from panguq.models.packed_integers import PackedIntegers
from panguq.models.tokenizer_files import read_tokenizer

logger = logging.getLogger("panguq")

GENERATION_CONFIG = "generation_config.json"

__all__ = [
    "chat_inputs",
    "chat_prompt",
    "load_pretrained",
    "load_tokenizer",
    "skeleton",
    "split_thinking",
]

_TOKENIZERS = ("tokenizer*", "vocab*", "*.gguf", "spiece.model")


def load_pretrained(folder: str | Path) -> Any:
    """The transformers model in a local folder, in the dtype in which most weights are stored.

    Weights are memory-mapped. Those in FP8 or MXFP4 are made into the config's dtype, in nameless
    files; see `packed_floats`. Weight-only folders of
    gptq, awq and compressed-tensors load as float32, in which their values are exact; see
    `packed_integers`. `model.panguq_unused_weights` names those of the checkpoint that the
    architecture does not use (layers that predict further tokens, a vision tower), and files of
    weights that were not read; a warning does so, too. Of config.json and generation_config.json
    only what transformers' classes know counts, and nothing that chooses code or files. openPangu's
    models come with code of their own, too: the dense ones (model type `PanguEmbedded`) load as the
    Llama architecture (`openpangu_config`), mixtures of experts as panguq's own
    (`panguq.models.openpangu.mixture_models`). A GGUF file, or a folder with one and no
    config.json, loads as float32.

    Raises InputError for a folder that is missing, has no config or no weights, or holds
    another kind of model, a quantized one or an adapter; StorageError, naming the file, for a
    damaged checkpoint.
    """
    path = existing_folder(folder)
    gguf = find_gguf(path)
    refuse_adapter(path if gguf is None else gguf.parent)
    if gguf is not None:
        model = load_gguf(gguf, _gguf_config(gguf))
        model.config.name_or_path = str(gguf)
        return model
    data = _config_data(path)
    config = _config(data, path)
    openpangu_config.check_known_pieces(path, config)
    tensors = stored_tensors(path)
    others = other_files(path, tensors)
    _check_layers(path, config, len(tensors))
    packed = packed_weights(data, path)
    dtype = _dtype(tensors, packed) or torch.float32
    model, unused = load_weights(path, config, tensors, dtype, packed)
    openpangu_config.check_no_other_weights(
        path, str(data.get("model_type")), getattr(model.config, "num_hidden_layers", 0), unused
    )
    if unused:
        logger.warning(
            "%s: %s has no use for %d weights, which are left out: %s",
            path, type(model).__name__, len(unused), name_groups(model, unused),
        )  # fmt: skip
    model.panguq_unused_weights = (*unused, *others)
    model.generation_config = _generation_config(path, data)
    model.config.name_or_path = model.name_or_path = str(path)
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a local folder, or in the folder of a GGUF file, or in that file.

    Raises InputError if there is none that loads.
    """
    path = existing_folder(folder)
    gguf = find_gguf(path)
    if gguf is None:
        return read_tokenizer(path)
    if (gguf.parent / "tokenizer_config.json").is_file():
        return read_tokenizer(gguf.parent)
    return read_gguf_tokenizer(gguf)


def skeleton(folder: str | Path) -> nn.Module:
    """The model in a local folder without its weights: all tensors are fake.

    Only config.json and the headers of weight files are read, and the weights may be missing. It
    can be traced and planned, not run. Raises InputError as `load_pretrained` does.
    """
    path = existing_folder(folder)
    gguf = find_gguf(path)
    refuse_adapter(path if gguf is None else gguf.parent)
    if gguf is not None:
        return _fake_model(_gguf_config(gguf), path, torch.float32)
    data = _config_data(path)
    return _fake_model(
        _config(data, path), path, _dtype_if_stored(path, packed_weights(data, path))
    )


def skeleton_of_config(data: Mapping[str, Any], folder: Path) -> nn.Module:
    """The model that the contents of the folder's config.json describe: all tensors are fake.

    Raises InputError as `read_config` does.
    """
    return _fake_model(_config(dict(data), folder), folder)


def _fake_model(config: Any, path: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Raises StorageError, naming `path`, for values that the model's class does not take."""
    kind, config = model_class(config, path)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        model = _without_weights(kind, config, dtype)
    except Exception as error:  # each model class stumbles over values in its own way
        raise StorageError(
            f"{path}: no model can be made as {CONFIG} says: {first_lines(error)}",
            "the file is damaged; download it again",
        ) from error
    return model.eval()


def _without_weights(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            made: nn.Module = kind._from_config(config, dtype=dtype)
            return made
    except DataDependentOutputException:  # it reads a number while it is made, as ViT does
        with torch.device("meta"):
            made = kind._from_config(config, dtype=dtype)
    memo: dict[int, Any] = {}
    with mode:
        for parameter in made.parameters():
            fake = torch.empty_like(parameter, device="cpu")
            memo[id(parameter)] = nn.Parameter(fake, requires_grad=False)
        for buffer in made.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="cpu")
    return copy.deepcopy(made, memo)


def read_config(folder: Path) -> Any:
    """The folder's config, an object of transformers' own class for its model type.

    Raises InputError for a model that panguq does not read.
    """
    return _config(_config_data(folder), folder)


def _dtype_if_stored(
    path: Path, packed: PackedFloats | PackedIntegers | None
) -> torch.dtype | None:
    if not any(path.glob("*.safetensors")):
        return None
    return _dtype(stored_tensors(path), packed)


def _dtype(
    tensors: list[StoredTensor], packed: PackedFloats | PackedIntegers | None
) -> torch.dtype | None:
    if packed is None:
        return stored_dtype(tensors)
    plain = stored_dtype(packed.plain(tensors))
    return packed.dtype if isinstance(packed, PackedIntegers) else plain


def _gguf_config(file: Path) -> Any:
    config = gguf_config(file)
    _check_architectures(config, file)
    return config


def _config_data(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder}: there is no {CONFIG}",
            "give a folder as transformers' save_pretrained writes it",
        )
    return read_object(path)


def _config(data: dict[str, Any], folder: Path) -> Any:
    model_type = str(data.get("model_type", ""))
    packed_weights(data, folder)
    if model_type == openpangu_config.MODEL_TYPE:
        data = openpangu_config.as_llama(data)
    elif model_type not in config_classes():
        own_code = "; it needs code of its own, which is not run" if "auto_map" in data else ""
        raise InputError(f"{folder}: unknown model type {model_type!r}{own_code}", SERVED)
    config = build_config(data, folder / CONFIG)
    _check_architectures(config, folder)
    return config


def _generation_config(folder: Path, data: dict[str, Any]) -> Any:
    """What the folder says about generation, in older ones in config.json."""
    path = folder / GENERATION_CONFIG
    if path.is_file():
        return build_generation_config(read_object(path), path)
    return build_generation_config(data, folder / CONFIG, from_model=True)


def _check_layers(folder: Path, config: Any, stored: int) -> None:
    """Refuse a config with more layers than there are weights, before they are all built."""
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > stored:
        raise StorageError(
            f"{folder}: {CONFIG} asks for {layers} layers, and there are {stored} weights",
            "the checkpoint is damaged or belongs to another config; download it again",
        )


def _check_architectures(config: Any, folder: Path) -> None:
    """Raises InputError for a model that panguq does not read, StorageError for no names."""
    given = getattr(config, "architectures", None) or []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise StorageError(f"{folder / CONFIG}: architectures is no list of names", "correct it")
    model_class(config, folder)


def existing_folder(folder: str | Path) -> Path:
    """The absolute path of a model's folder or GGUF file. Raises InputError if there is none."""
    path = Path(folder)
    if not path.exists():
        raise InputError(
            f"{folder}: no such folder",
            "panguq loads models from local folders only; download the model first",
        )
    if not path.is_dir() and path.suffix != ".gguf":
        raise InputError(f"{folder}: not a folder", "give the folder that holds config.json")
    return path.resolve()


def source_tokenizer(model: Any) -> Any:
    """The tokenizer in the local folder that a transformers model was loaded from.

    None for a model that names no such folder, for one whose folder has no tokenizer, which is
    said, and for one that has other tokens than its folder says.
    """
    place = Path(str(getattr(getattr(model, "config", None), "name_or_path", None) or ""))
    if place == Path() or not place.exists():
        return None
    if place.is_dir() and not any(f for p in _TOKENIZERS for f in place.glob(p)):
        return None
    if _resized(model, place):
        logger.warning(
            "the vocabulary was resized after the model was loaded from %s, so that folder's "
            "tokenizer is not saved along; pass tokenizer=",
            place,
        )
        return None
    try:
        return load_tokenizer(place)
    except PanguqError as error:
        logger.info("no tokenizer: %s", error.message)
        return None


def _resized(model: Any, folder: Path) -> bool:
    """Whether the embedding has other rows than the folder's config.json says."""
    try:
        said = parse_json(read_limited(folder / CONFIG, CONFIG_BYTES), CONFIG)
        table = model.get_input_embeddings().weight
    except (OSError, StorageError, AttributeError, NotImplementedError):
        return False
    text = said.get("text_config", said) if isinstance(said, dict) else {}
    rows = text.get("vocab_size") if isinstance(text, dict) else None
    return isinstance(rows, int) and rows != table.shape[0]
