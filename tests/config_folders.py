"""Folders that hold a config.json and nothing else: enough for a forecast and a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PANGU: dict[str, Any] = {
    "model_type": "PanguEmbedded",
    "architectures": ["PanguEmbeddedForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-5,
    "bias": True,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def config_folder(path: Path, config: dict[str, Any]) -> Path:
    """The folder with this config."""
    (path / "config.json").write_text(json.dumps(config))
    return path
