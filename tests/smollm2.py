"""SmolLM2-135M, whole or its first layers: what a test needs of a real model, and no more time."""

from __future__ import annotations

from typing import Any

import panguq
from demo.fetch import default_cache, fetch_calibration_text, fetch_model

OUTLIER_LAYERS = 12
"""The first layers up to the first massive activation, at the input of layer 11's down_proj."""


def load(layers: int | None = None) -> tuple[Any, Any, str]:
    """The model cut after this many layers, its tokenizer, and a long text."""
    folder = fetch_model(default_cache())
    text = fetch_calibration_text(default_cache()).read_text(encoding="utf-8")
    return first_layers(panguq.load_pretrained(folder), layers), panguq.load_tokenizer(folder), text


def first_layers(model: Any, layers: int | None) -> Any:
    """The same model without the layers that follow; None keeps all."""
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
    return model
