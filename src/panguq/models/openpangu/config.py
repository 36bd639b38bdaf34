"""openPangu's dense configuration, read without the code that ships with the model.

openPangu-Embedded-1B and 7B (model type `PanguEmbedded`) are Llama layers whose four attention
projections have biases: root mean square norms before attention and MLP, rotary embeddings over
half-split heads, grouped key/value heads, SwiGLU, no bias in the MLP. So the Llama architecture
holds them, and the weights keep their names. Source: config.json, configuration_openpangu_dense.py
and modeling_openpangu_dense.py of openPangu-Embedded-7B-V1.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from panguq.errors import InputError

MODEL_TYPE = "PanguEmbedded"
MIXTURES = ("PanguProMoE", "pangu_ultra_moe", "openpangu_v2", "pangu_v2_moe")
"""Model types of the mixtures of experts (`mixture_config.py`)."""

# What the published configuration class assumes where config.json is silent: the 7B's values.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 153376,
    "hidden_size": 4096,
    "intermediate_size": 12800,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 16e6,
    "tie_word_embeddings": False,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 45892,
}
_OPTIONAL = ("head_dim", "rope_scaling", "attention_dropout", "dtype", "torch_dtype")
# The 7B's shards also hold the rotary frequencies, which its own code computes anew from theta.
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NOT_READ = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def as_llama(data: Mapping[str, Any]) -> dict[str, Any]:
    """A `PanguEmbedded` config.json in the words of transformers' Llama.

    `bias` (true where it is not said) becomes `attention_bias`; the MLP has none.
    """
    given = {key: value for key, value in data.items() if value is not None}
    same = {key: given.get(key, default) for key, default in _DEFAULTS.items()}
    optional = {key: given[key] for key in _OPTIONAL if key in given}
    return {
        **same,
        **optional,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": bool(given.get("bias", given.get("attention_bias", True))),
        "mlp_bias": False,
    }


def check_known_pieces(folder: object, config: Any) -> None:
    """Refuse to load a model of which only a plan can be made. Raises InputError."""
    pieces = config.unknown_pieces() if config.model_type in MIXTURES else {}
    if pieces:
        raise InputError(
            f"{folder}: the model has pieces that panguq has no module for: {', '.join(pieces)}",
            "panguq compile --dry-run and panguq explain plan it, with these pieces as float; a "
            "compiled model without them would be another one",
        )


def check_no_other_weights(
    folder: object, model_type: str, layers: int, unexpected: Iterable[str]
) -> None:
    """Refuse a checkpoint of openPangu's with weights that the layers here have no place for.

    They would be left out without a word, and another model would run. Layers behind the `layers`
    of the model predict further tokens (MTP) and may be left out. Other model types than
    openPangu's are not looked at. Raises InputError.
    """
    if model_type not in (MODEL_TYPE, *MIXTURES):
        return
    behind = {name: int(found[1]) for name in unexpected if (found := _LAYER.match(name))}
    others = sorted(
        name
        for name in unexpected
        if not _NOT_READ.fullmatch(name) and behind.get(name, 0) < layers
    )
    if others:
        kind = "dense layers" if model_type == MODEL_TYPE else f"layers ({model_type})"
        raise InputError(
            f"{folder}: {len(others)} weights have no place in openPangu's {kind}: "
            f"{', '.join(others[:4])}",
            "only the published architectures are known, as config.json says them",
        )
