"""Predicted W8A8 prefill gain of openPangu-Embedded 1B and 7B, from their sizes alone."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from panguq.cli.command import quiet_transformers
from panguq.explain.model import explain_model
from panguq.forecast.graph import graph_of
from panguq.lowering.targets import find_target

PROMPTS = (512, 1024, 2048, 4096)
# Sizes of openPangu-Embedded V1.1; four layers, as all layers are alike and time is a sum.
LAYERS = 4
CONFIGS: dict[str, dict[str, object]] = {
    "1B": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
FULL_LAYERS = {"1B": 26, "7B": 34}
_COMMON = {
    "model_type": "PanguEmbedded",
    "architectures": ["PanguEmbeddedForCausalLM"],
    "vocab_size": 153376,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "bias": True,
    "torch_dtype": "float16",
    "num_hidden_layers": LAYERS,
}


def config(name: str) -> dict[str, object]:
    """The config.json of one of `CONFIGS`, with `LAYERS` layers."""
    return _COMMON | CONFIGS[name]


@functools.cache
def _graph(name: str) -> Any:
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(config(name))
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        return graph_of(folder, "W8A8", "float16")


def prefill_gains(name: str, target: str, weight_format: str) -> dict[int, float]:
    """For each prompt length, how many times faster than float16 the prefill is predicted to be.

    The layers' time is scaled to the model's number of layers; the logits' is counted once.
    """
    gm, interface = _graph(name)
    result = {}
    for prompt in PROMPTS:
        found = explain_model(
            gm,
            interface,
            find_target(target),
            "float16",
            "W8A8",
            prompt=prompt,
            weight_format=weight_format,  # type: ignore[arg-type]
        )
        head = sum(row.prefill_us for row in found.matmuls if row.n == _COMMON["vocab_size"])
        scale = FULL_LAYERS[name] / LAYERS
        us, float_us = (
            (total - head) * scale + head for total in (found.prefill.us, found.prefill.float_us)
        )
        result[prompt] = float_us / us
    return result
