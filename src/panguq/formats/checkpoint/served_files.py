"""What every checkpoint for a server has beside its weights: configurations and the tokenizer."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import fields
from typing import Any

import torch

from panguq.artifact import Artifact
from panguq.errors import InputError
from panguq.files.strict_json import json_text
from panguq.models.architectures import model_class
from panguq.models.config import known_settings
from panguq.models.tokenizer_files import tokenizer_files
from panguq.tensors.dtypes import dtype_name

logger = logging.getLogger("panguq")

_FURTHER_TOKENS = (
    "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers",
)  # fmt: skip
"""How many layers predict further tokens. They are no part of a compiled model."""
_OF_FURTHER_TOKENS = ("mtp_layer_types", "mtp_layers_block_type", "mtp_mlp_layer_types")


def config_of(artifact: Artifact, is_tied: bool) -> dict[str, Any]:
    """config.json as the folder is: with the vocabulary that the embedding has, whether the logits
    have weights of their own, without code, and without weights that are not there."""
    data = served_config(artifact.config, artifact.dtype)
    if artifact.interface.vocab_size is not None:
        data["vocab_size"] = artifact.interface.vocab_size
    data["tie_word_embeddings"] = is_tied
    data |= {key: 0 for key in _FURTHER_TOKENS if getattr(artifact.config, key, None)}
    return {key: value for key, value in data.items() if key not in _OF_FURTHER_TOKENS}


def served_config(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """config.json in the words of transformers 5 and, beside them, of 4, which servers may have.

    A reader of the one ignores the other's: `dtype` and `torch_dtype`, `rope_parameters` and
    `rope_theta` with `rope_scaling`. Without the older ones, transformers 4 would silently take
    the default rotary base. A value that transformers 5 writes under another name than its class
    declares is there under both. Servers choose a model by `architectures`.
    """
    data = known_settings(type(config), json.loads(config.to_json_string(use_diff=True)))
    name = dtype_name(dtype)
    declared = {field.name for field in fields(config)}
    for key, stored in type(config).attribute_map.items():
        if key in declared and stored in data:  # published configs have `num_experts`, say
            data.setdefault(key, data[stored])
    data |= {"model_type": config.model_type, "dtype": name, "torch_dtype": name}
    data["architectures"] = [_architecture(config)]
    rope = data.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        is_plain = scaling.get("rope_type", "default") == "default"
        data |= {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if is_plain else scaling,
        }
    return data


def _architecture(config: Any) -> str:
    """The model's class; a text's config taken out of a larger model's may name that one's."""
    try:
        return str(model_class(config)[0].__name__)
    except InputError:
        own = copy.copy(config)
        own.architectures = None
        return str(model_class(own)[0].__name__)


def served_files(artifact: Artifact) -> dict[str, bytes | str]:
    """generation_config.json and the tokenizer's files; a warning where there is no tokenizer."""
    files: dict[str, bytes | str] = {}
    if artifact.generation_config is not None:
        generation = artifact.generation_config.to_json_string(use_diff=True)
        files["generation_config.json"] = generation
    if artifact.tokenizer is None and artifact.interface.vocab_size is None:  # it reads no text
        return files
    if artifact.tokenizer is None:
        logger.warning(
            "the folder has NO TOKENIZER, and a server will not take text without one: none lies "
            "where the model was loaded from; pass tokenizer= to panguq.compile"
        )
        return files
    rows = artifact.interface.vocab_size
    if rows is not None and len(artifact.tokenizer) > rows:
        logger.warning(
            "the tokenizer has %d tokens and the model's embedding %d rows: text with the last of "
            "them is refused, or breaks a server",
            len(artifact.tokenizer), rows,
        )  # fmt: skip
    files |= tokenizer_files(artifact.tokenizer)
    name = "tokenizer_config.json"
    settings = json.loads(files[name])
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # the name that transformers before 5 knows
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        files[name] = json_text(settings, sort_keys=True)
    return files
