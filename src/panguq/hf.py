"""Local model folders in transformers' format: nothing is downloaded, no code of theirs is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from panguq import openpangu_config
from panguq.checkpoint_files import CONFIG, stored_dtype, stored_tensors
from panguq.errors import InputError, StorageError
from panguq.gguf_files import find_gguf, gguf_config, load_gguf
from panguq.gguf_tokenizer import read_gguf_tokenizer
from panguq.openpangu_chat import chat_inputs, chat_prompt, split_thinking
from panguq.strict_json import parse_json
from panguq.tokenizer_files import read_tokenizer

__all__ = [
    "chat_inputs",
    "chat_prompt",
    "load_pretrained",
    "load_tokenizer",
    "skeleton",
    "split_thinking",
]

_SERVED = "panguq compiles decoder-only causal language models that transformers itself defines"


def load_pretrained(folder: str | Path) -> Any:
    """The transformers model in a local folder, in the dtype in which its weights are stored.

    Weights are memory-mapped where transformers does that. openPangu's dense models (model type
    `PanguEmbedded`), which come with code of their own, load as the Llama architecture; see
    `openpangu_config`. A GGUF file, or a folder with one and no config.json, loads as float32.

    Raises InputError for a folder that is missing, has no config or no weights, or holds
    another kind of model; StorageError, naming the file, for a damaged checkpoint.
    """
    from transformers import AutoModelForCausalLM

    path = _existing(folder)
    gguf = find_gguf(path)
    if gguf is not None:
        return load_gguf(gguf, _gguf_config(gguf))
    data = _config_data(path)
    config = _config(data, path)
    dtype = stored_dtype(stored_tensors(path)) or torch.float32
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"{path}: the weights do not fit {CONFIG}: {_first_line(error)}",
            "the checkpoint is damaged or belongs to another config; download it again",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random numbers
        raise StorageError(
            f"{path}: {len(missing)} weights are missing: {', '.join(missing[:4])}",
            "the checkpoint is incomplete; download it again",
        )
    if data.get("model_type") == openpangu_config.MODEL_TYPE:
        openpangu_config.check_no_other_weights(path, info["unexpected_keys"])
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a local folder, or in the folder of a GGUF file, or in that file.

    Raises InputError if there is none that loads.
    """
    path = _existing(folder)
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
    from transformers import AutoModelForCausalLM

    path = _existing(folder)
    gguf = find_gguf(path)
    config = read_config(path) if gguf is None else _gguf_config(gguf)
    dtype = torch.float32 if gguf is not None else _dtype_if_stored(path)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def read_config(folder: Path) -> Any:
    """The folder's config, an object of transformers' own class for its model type.

    Raises InputError for anything but a decoder-only causal language model in floating point.
    """
    return _config(_config_data(folder), folder)


def _dtype_if_stored(path: Path) -> torch.dtype | None:
    if not any(path.glob("*.safetensors")):
        return None
    return stored_dtype(stored_tensors(path))


def _gguf_config(file: Path) -> Any:
    config = gguf_config(file)
    _check_causal_lm(config, file)
    return config


def _config_data(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder}: there is no {CONFIG}",
            "give a folder as transformers' save_pretrained writes it",
        )
    data = parse_json(path.read_bytes(), str(path))
    if not isinstance(data, dict):
        raise StorageError(f"{path}: not an object", "download the file again")
    return data


def _config(data: dict[str, Any], folder: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / CONFIG
    model_type = str(data.get("model_type", ""))
    if "quantization_config" in data:
        raise InputError(
            f"{folder}: the model is quantized already",
            "give the float checkpoint that it was made from",
        )
    if model_type == openpangu_config.MODEL_TYPE:
        data = openpangu_config.as_llama(data)
    elif model_type not in CONFIG_MAPPING:
        own_code = "; it needs code of its own, which is not run" if "auto_map" in data else ""
        raise InputError(f"{folder}: unknown model type {model_type!r}{own_code}", _SERVED)
    settings = {key: value for key, value in data.items() if key not in ("auto_map", "model_type")}
    try:
        config = AutoConfig.for_model(data["model_type"], **settings)
    except Exception as error:  # each configuration class checks its values in its own way
        raise StorageError(
            f"{path}: {_first_line(error)}", "the file is damaged; download it again"
        ) from error
    _check_causal_lm(config, folder)
    return config


def _check_causal_lm(config: Any, folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    given = list(getattr(config, "architectures", None) or [])
    encodes = getattr(config, "is_encoder_decoder", False)
    if not isinstance(name, str) or encodes or (given and name not in given):
        what = ", ".join(given) or f"model type {config.model_type}"
        raise InputError(
            f"{folder}: holds a {what}, which is no decoder-only causal language model", _SERVED
        )


def _existing(folder: str | Path) -> Path:
    path = Path(folder)
    if not path.exists():
        raise InputError(
            f"{folder}: no such folder",
            "panguq loads models from local folders only; download the model first",
        )
    if not path.is_dir() and path.suffix != ".gguf":
        raise InputError(f"{folder}: not a folder", "give the folder that holds config.json")
    return path.resolve()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300] if lines else type(error).__name__
