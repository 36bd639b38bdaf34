"""Local model folders in transformers' format: nothing is downloaded, no code of theirs is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from panguq.checkpoint_files import CONFIG, stored_dtype, weight_files
from panguq.errors import InputError, StorageError
from panguq.strict_json import parse_json
from panguq.tokenizer_files import read_tokenizer

_SERVED = "panguq compiles decoder-only causal language models that transformers itself defines"


def load_pretrained(folder: str | Path) -> Any:
    """The transformers model in a local folder, in the dtype in which its weights are stored.

    Weights are memory-mapped where transformers does that. openPangu's dense models (model type
    `PanguEmbedded`), which come with code of their own, load as the Llama architecture: the
    layers are the same, and what their `bias: true` adds are biases of the four attention
    projections, so it becomes Llama's `attention_bias: true` with `mlp_bias: false`; weights
    keep their names.

    Raises InputError for a folder that is missing, has no config or no weights, or holds
    another kind of model; StorageError, naming the file, for a damaged checkpoint.
    """
    from transformers import AutoModelForCausalLM

    path = _existing(folder)
    config = read_config(path)
    files = weight_files(path)
    dtype = stored_dtype(files) or torch.float32
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
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a local folder. Raises InputError if there is none that loads."""
    return read_tokenizer(_existing(folder))


def skeleton(folder: str | Path) -> nn.Module:
    """The model in a local folder without its weights: all tensors are fake.

    Only config.json and the headers of weight files are read, and the weights may be missing. It
    can be traced and planned, not run. Raises InputError as `load_pretrained` does.
    """
    from transformers import AutoModelForCausalLM

    path = _existing(folder)
    config = read_config(path)
    try:
        dtype = stored_dtype(weight_files(path))
    except InputError:
        dtype = None
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def read_config(folder: Path) -> Any:
    """The folder's config, an object of transformers' own class for its model type.

    Raises InputError for anything but a decoder-only causal language model in floating point.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder}: there is no {CONFIG}",
            "give a folder as transformers' save_pretrained writes it",
        )
    data = parse_json(path.read_bytes(), str(path))
    if not isinstance(data, dict):
        raise StorageError(f"{path}: not an object", "download the file again")
    model_type = str(data.get("model_type", ""))
    if "quantization_config" in data:
        raise InputError(
            f"{folder}: the model is quantized already",
            "give the float checkpoint that it was made from",
        )
    if model_type == "PanguEmbedded":
        data = _pangu_as_llama(data)
    elif model_type not in CONFIG_MAPPING:
        own_code = "; it needs code of its own, which is not run" if "auto_map" in data else ""
        raise InputError(f"{folder}: unknown model type {model_type!r}{own_code}", _SERVED)
    data.pop("auto_map", None)
    try:
        config = AutoConfig.for_model(data.pop("model_type"), **data)
    except Exception as error:  # each configuration class checks its values in its own way
        raise StorageError(
            f"{path}: {_first_line(error)}", "the file is damaged; download it again"
        ) from error
    _check_causal_lm(config, folder)
    return config


_SAME_IN_LLAMA = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id", "initializer_range", "use_cache", "attention_dropout", "dtype", "torch_dtype",
)  # fmt: skip


def _pangu_as_llama(data: dict[str, Any]) -> dict[str, Any]:
    """openPangu's dense config in Llama's words; see `load_pretrained`."""
    same = {key: data[key] for key in _SAME_IN_LLAMA if data.get(key) is not None}
    bias = bool(data.get("bias", data.get("attention_bias", False)))
    return {
        **same,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": bias,
        "mlp_bias": False,
    }


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
    if not path.is_dir():
        raise InputError(f"{folder}: not a folder", "give the folder that holds config.json")
    return path.resolve()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300] if lines else type(error).__name__
