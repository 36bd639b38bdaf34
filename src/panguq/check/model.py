"""The modules and weights that a config.json asks for, without any weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from panguq.errors import PanguqError


@dataclass(frozen=True)
class ExpectedModel:
    """`linears` `(n, k)` by module path, the logits' among them; `embeddings` by module path;
    `parameters` by name with their shapes; `tied`: those that are another parameter's tensor."""

    linears: Mapping[str, tuple[int, int]]
    embeddings: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]


def expected_model(config: Mapping[str, Any]) -> ExpectedModel | None:
    """What transformers builds for this config; None if it has no such causal language model."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        model = _skeleton(plain)
    except (PanguqError, ValueError, TypeError, KeyError, AttributeError):
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {name for name, _ in model.named_parameters()}
    return ExpectedModel(
        linears={
            path: (module.out_features, module.in_features)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        },
        embeddings=tuple(p for p, m in model.named_modules() if isinstance(m, nn.Embedding)),
        parameters={name: tuple(p.shape) for name, p in parameters.items()},
        tied=frozenset(parameters) - first,
    )


def _skeleton(config: Mapping[str, Any]) -> nn.Module:
    from panguq.models.hf import skeleton_of_config

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return skeleton_of_config(config, Path())
    finally:
        logger.setLevel(level)
