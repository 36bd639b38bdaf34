"""config.json and generation_config.json as data: which of their keys count.

transformers' configuration classes keep any key that they are given, and its loaders act on some of
them: they fetch kernels from a hub and import them (`attn_implementation`), read another weight
file (`transformers_weights`), import code beside the weights (`auto_map`). A configuration is built
here out of the keys that its class knows, without those that choose code or files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from panguq.errors import StorageError
from panguq.files.limits import CONFIG_BYTES, read_limited
from panguq.files.strict_json import parse_json
from panguq.models.architectures import config_classes
from panguq.models.config_limits import check_sizes

logger = logging.getLogger("panguq")

_CHOOSES_CODE = frozenset({
    "attn_implementation", "auto_map", "custom_generate", "custom_pipelines", "distributed_config",
    "experts_implementation", "fusion_config", "kernel_config", "transformers_weights",
    "trust_remote_code", "use_kernels",
})  # fmt: skip
_QUANTIZED = ("quantization_config", "compression_config")
_PLAIN_CODE: tuple[Any, ...] = (None, False, {}, [], "eager", "sdpa")
"""Values of the keys above that choose nothing: transformers' own two attentions among them."""

# What transformers' code reads of any configuration, declared by its class or not: the base class's
# own parameters, rotary embeddings in the words of older files, masks, `getattr` in models.
_READ_OF_ANY = frozenset({
    "attention_chunk_size", "classifier_dropout", "dtype", "head_dim", "hidden_dropout",
    "hidden_size", "initializer_factor", "init_std", "initializer_range", "is_causal",
    "is_decoder", "layer_types", "max_position_embeddings", "num_labels",
    "original_max_position_embeddings", "partial_rotary_factor", "per_layer_config",
    "rope_parameters", "rope_scaling", "rope_theta", "router_bias", "sep_token_id",
    "sliding_window", "tie_last_hidden_states", "tie_word_embeddings", "torch_dtype",
    "use_bidirectional_attention",
})  # fmt: skip
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_OF_GENERATION = ("_from_model_config", "transformers_version")
_UNSAFE_GENERATION = frozenset({"compile_config", "continuous_batching_config", "custom_generate"})


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, in which Mamba-2's time steps may reach up to Infinity. Raises
    StorageError, naming the file, for anything else."""
    data = parse_json(read_limited(path, CONFIG_BYTES, _DAMAGED), str(path), infinities=True)
    if not isinstance(data, dict):
        raise StorageError(f"{path}: not an object", _DAMAGED)
    return data


def build_config(data: Mapping[str, Any], path: Path) -> Any:
    """The configuration, an object of transformers' class for `model_type`, which there must be.

    Keys that choose code or files are left out and named in a warning. Raises StorageError,
    naming `path`, for values that the class does not take.
    """
    from transformers import AutoConfig

    kind = config_classes()[data["model_type"]]
    left = sorted(_choices(data))
    if left:
        logger.warning(
            "%s: not followed: %s; no code but transformers' own is run (%s), and no file is read "
            "that was not checked",
            path, ", ".join(left), kind.__name__.removesuffix("Config"),
        )  # fmt: skip
    try:
        settings = _with_infinities(known_settings(kind, data))
        check_sizes(settings, path)
        return AutoConfig.for_model(data["model_type"], **settings)
    except StorageError:
        raise
    except Exception as error:  # each configuration class checks its values in its own way
        raise StorageError(f"{path}: {first_lines(error)}", _DAMAGED) from error


def _with_infinities(value: Any) -> Any:
    """`{"__float__": "Infinity"}`, as transformers writes what is no number in JSON, as a float."""
    if isinstance(value, dict):
        name = value.get("__float__")
        if len(value) == 1 and name in ("Infinity", "-Infinity"):
            return float(name)
        return {key: _with_infinities(entry) for key, entry in value.items()}
    return [_with_infinities(entry) for entry in value] if isinstance(value, list) else value


def check_known_sizes(data: Mapping[str, Any], path: Path) -> None:
    """Raises StorageError for a number beyond what any model has, under a key that transformers'
    class for the model type reads; of another type's config, nothing is built."""
    model_type, kinds = str(data.get("model_type", "")), config_classes()
    if model_type in kinds:
        with suppress(ValueError):  # a dtype that is none; whoever builds it says so
            check_sizes(known_settings(kinds[model_type], data), path)


def known_settings(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that transformers' configuration class `kind` reads.

    Parts with a configuration of their own (`text_config`) are treated in the same way. Raises
    ValueError for a dtype that is no floating point dtype of a model.
    """
    names = _known_names(kind)
    kept = {key: value for key, value in data.items() if key in names}
    for key in ("dtype", "torch_dtype"):
        if key in kept:
            kept[key] = _dtype_name(kept[key])
    for key, part in kind.sub_configs.items():
        if isinstance(kept.get(key), dict):
            kept[key] = _part_settings(part, kept[key])
    if isinstance(kept.get("per_layer_config"), dict):
        kept["per_layer_config"] = {
            layer: known_settings(kind, entry) if isinstance(entry, dict) else entry
            for layer, entry in kept["per_layer_config"].items()
        }
    return kept


def plain_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json whose class is unknown, without those that choose code."""
    return {key: value for key, value in data.items() if _is_plain(key) and key != "model_type"}


def build_generation_config(data: Mapping[str, Any], path: Path, from_model: bool = False) -> Any:
    """A `GenerationConfig` of the keys that transformers' class has.

    from_model: `data` is a config.json, out of which older models take what generation needs.
    Raises StorageError, naming `path`, for values that it does not take.
    """
    from transformers import GenerationConfig

    names = {*GenerationConfig().to_dict(), *_OF_GENERATION} - _UNSAFE_GENERATION
    kept = {key: value for key, value in data.items() if key in names}
    if from_model:
        kept["_from_model_config"] = True
    try:
        return GenerationConfig(**kept)
    except Exception as error:  # whatever its checks stumble over
        raise StorageError(f"{path}: {first_lines(error)}", _DAMAGED) from error


def first_lines(error: BaseException) -> str:
    """What an error of transformers says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300] if lines else type(error).__name__


# --- which keys a class knows -------------------------------------------------------------------


def _known_names(kind: Any) -> set[str]:
    """Keys that a configuration class knows: its fields, other names for them, and what its own
    methods name, which take over what older files say (`kwargs.pop("sliding_window_pattern")`)."""
    from transformers import PretrainedConfig

    names = {field.name for field in fields(kind)} | _READ_OF_ANY
    names |= {*kind.attribute_map, *kind.attribute_map.values()}  # it writes the second of the two
    for owner in kind.__mro__:
        if owner not in PretrainedConfig.__mro__:
            names.update(word for code in _methods(owner) for word in _words(code))
    return {name for name in names if _is_plain(name)} - {"self", "cls", "model_type", "kwargs"}


def _methods(owner: type) -> Iterator[CodeType]:
    for name, value in vars(owner).items():
        if name.startswith("__") and name not in ("__init__", "__post_init__"):
            continue
        for part in (value, getattr(value, "fget", None), getattr(value, "fset", None)):
            if isinstance(part, FunctionType):
                yield part.__code__


def _words(code: CodeType) -> Iterator[str]:
    """The names of a function's parameters and the strings in it, of functions in it too."""
    yield from code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words(constant)


def _part_settings(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING, PretrainedConfig

    model_type = data.get("model_type")
    if not issubclass(kind, PretrainedConfig):  # AutoConfig: the part says what it is
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            return plain_settings(data)
        kind = CONFIG_MAPPING[model_type]
    named = {"model_type": model_type} if isinstance(model_type, str) else {}
    return {**known_settings(kind, data), **named}


def _is_plain(key: str) -> bool:
    return not key.startswith("_") and key not in _CHOOSES_CODE and key not in _QUANTIZED


def _choices(data: Mapping[str, Any], part: str = "") -> Iterator[str]:
    """The keys of a config.json that choose code or files, with what they choose."""
    for key, value in data.items():
        if key.removeprefix("_").removesuffix("_internal") in _CHOOSES_CODE:
            if value not in _PLAIN_CODE:
                yield f"{part}{key}: {_shown(value)}"
        elif isinstance(value, dict):
            yield from _choices(value, f"{part}{key}.")


def _shown(value: Any) -> str:
    words = value.values() if isinstance(value, dict) else [value]
    return ", ".join(str(word) for word in words)[:100]


def _dtype_name(value: Any) -> str | None:
    """A floating point dtype's name, given with or without `torch.` in front; None for `auto`."""
    name = str(value).removeprefix("torch.")
    if value is None or name == "auto":
        return None
    if name not in _FLOATS:
        raise ValueError(f"dtype {value!r} is none of {', '.join(_FLOATS)}")
    return name


_DAMAGED = "the file is damaged; download it again"
