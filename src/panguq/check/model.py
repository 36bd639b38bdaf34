"""The modules and weights that a config.json asks for, without any weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from panguq.errors import PanguqError
from panguq.models.hub_names import HubNames, hub_names


@dataclass(frozen=True)
class ExpectedModel:
    """`linears` `(n, k)` by module path, the logits' among them; `embeddings` by module path;
    `parameters` by name with their shapes; `tied`: those that are another parameter's tensor.
    `names`: the published ones, by those in memory."""

    linears: Mapping[str, tuple[int, int]]
    embeddings: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]
    names: HubNames

    def published(self) -> ExpectedModel:
        """The same under the names of the published checkpoint."""
        names = self.names
        if not names.differ:
            return self
        return replace(
            self,
            linears={
                **{names.module(path): shape for path, shape in self.linears.items()},
                **self._experts(),
            },
            embeddings=tuple(names.module(path) for path in self.embeddings),
            parameters={
                **{
                    names.tensors.get(n, n): shape
                    for n, shape in self.parameters.items()
                    if n not in names.merged
                },
                **{f"{path}.weight": shape for path, shape in self._experts().items()},
            },
            tied=frozenset(names.tensors.get(name, name) for name in self.tied),
        )

    def _experts(self) -> dict[str, tuple[int, int]]:
        """`(n, k)` of every linear that is part of a tensor in memory, by its published path."""
        found = {}
        for name, parts in self.names.merged.items():
            experts = len({part.expert for part in parts})
            for part in parts:
                # whichever way the one in memory lies
                k = math.prod(self.parameters[name]) // experts // max(p.end for p in parts)
                if part.name.endswith(".weight"):
                    found[part.name.removesuffix(".weight")] = (part.end - part.start, k)
        return found

    def as_stored(self, stored: Iterable[str]) -> ExpectedModel:
        """The same for a folder with tensors of these names: vLLM may know experts one by one that
        are published as one tensor."""
        return replace(self, names=self.names.as_stored(stored))

    def called_as_in_memory(self, stored: Iterable[str]) -> dict[str, str]:
        """Those of the stored tensors that are not called as they are published, with how."""
        tensors = self.names.tensors
        here = {name.rpartition(".")[0] for name, there in tensors.items() if name == there}
        modules = {
            name.rpartition(".")[0]: there.rpartition(".")[0]
            for name, there in tensors.items()
            if name != there
        }
        found = {}
        for name in stored:
            if self.names.merged.get(name):
                found[name] = f"{self.names.merged[name][0].name} and others"
            path, _, leaf = name.rpartition(".")
            if tensors.get(name, name) != name:
                found[name] = tensors[name]
            elif path in modules and path not in here:  # else one of its tensors alone moves
                found[name] = f"{modules[path]}.{leaf}"
        return found


def expected_model(config: Mapping[str, Any]) -> ExpectedModel | None:
    """What transformers builds for this config, under its names in memory; None if it has no such
    causal language model."""
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
        names=hub_names(model),
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
