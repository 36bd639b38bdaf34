"""The names of a model's published weights, where transformers has others for them in memory.

transformers renames and merges weights while it loads some architectures (`transformer.h.0.ln_1` of
EXAONE is `model.layers.0.input_layernorm` in memory), and takes that back when it saves. Servers
know the published names alone. What is asked here is transformers' own way back, which
`save_pretrained` takes; there is no list of names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HubNames:
    """`tensors`: by a tensor's name in memory, its published one, which may be the same.
    `merged`: names in memory of tensors that are no tensor of the published checkpoint, but
    several, or a part of one."""

    tensors: Mapping[str, str]
    merged: tuple[str, ...] = ()

    @property
    def differ(self) -> bool:
        """Whether anything is called otherwise than in memory."""
        return bool(self.merged) or any(here != there for here, there in self.tensors.items())

    def module(self, path: str) -> str:
        """The published name of the module at `path`, which has a weight or a bias."""
        for leaf in ("weight", "bias"):
            if f"{path}.{leaf}" in self.tensors:
                return self.tensors[f"{path}.{leaf}"].rpartition(".")[0]
        return path

    @cached_property
    def in_memory(self) -> Mapping[str, str]:
        """By a published name the name in memory."""
        return {there: here for here, there in self.tensors.items()}

    def module_in_memory(self, path: str) -> str:
        """The path in memory of the module that is published as `path`."""
        for leaf in ("weight", "bias"):
            if f"{path}.{leaf}" in self.in_memory:
                return self.in_memory[f"{path}.{leaf}"].rpartition(".")[0]
        return path


def hub_names(model: nn.Module) -> HubNames:
    """The published names of a model's weights, without looking at their values.

    model: of transformers, made from its config with fake weights or none; others are called as
    they are. A prefix that a larger model would put in front of all names (`language_model.`) is
    not put there.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict(keep_vars=True)
    if not isinstance(model, PreTrainedModel):
        return HubNames({name: name for name in state})
    # One tensor for each name, which tells where it comes out.
    here = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}
    there: dict[str, Tensor] = revert_weight_conversion(model, dict(here))
    published = {id(tensor): name for name, tensor in there.items()}
    return HubNames(
        {name: published[id(t)] for name, t in here.items() if id(t) in published},
        tuple(name for name, t in here.items() if id(t) not in published),
    )
