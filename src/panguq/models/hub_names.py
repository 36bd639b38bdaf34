"""The names of a model's published weights, where transformers has others for them in memory.

transformers renames and merges weights while it loads some architectures (`transformer.h.0.ln_1` of
EXAONE is `model.layers.0.input_layernorm` in memory), and takes that back when it saves. Servers
know the published names alone. What is asked here is transformers' own way back, which
`save_pretrained` takes; there is no list of names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WeightPart:
    """A published tensor that is a part of one in memory: rows `start` to `end`, of one expert
    where the tensor holds several."""

    name: str
    expert: int | None
    start: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the tensor in memory, or of another with as many rows; a view."""
        own = tensor if self.expert is None else tensor[self.expert]
        return own[self.start : self.end]


@dataclass(frozen=True)
class HubNames:
    """`tensors`: by a tensor's name in memory, its published one, which may be the same. `merged`:
    by the name of one that is published in parts, such as a layer's experts, those parts; none
    where it is published in another way."""

    tensors: Mapping[str, str]
    merged: Mapping[str, tuple[WeightPart, ...]] = field(default_factory=dict)

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

    def published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their published names; parts are views. Raises KeyError for one that is
        published in another way."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name not in self.merged:
                found[self.tensors.get(name, name)] = tensor
            elif not self.merged[name]:
                raise KeyError(name)
            else:
                found |= {part.name: part.of(tensor) for part in self.merged[name]}
        return found


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
    merged = {}
    for name, tensor in here.items():
        if id(tensor) not in published:
            numbered = revert_weight_conversion(model, {name: _numbered(tensor.shape)})
            parts = [_part(n, rows, tensor.shape, there.get(n)) for n, rows in numbered.items()]
            merged[name] = tuple(part for part in parts if part is not None)
            if len(merged[name]) < len(parts):
                merged[name] = ()
    return HubNames(
        {name: published[id(t)] for name, t in here.items() if id(t) in published}, merged
    )


def _numbered(shape: Sequence[int]) -> Tensor:
    """A tensor that says of each row which it is: as wide as one number in all other axes."""
    experts, rows = (shape[0], shape[1]) if len(shape) == _STACKED else (1, shape[0])
    numbers = torch.arange(experts * rows, dtype=torch.int32)
    return numbers.view(experts, rows, 1) if len(shape) == _STACKED else numbers.view(rows, 1)


def _part(name: str, rows: Tensor, whole: Sequence[int], form: Tensor | None) -> WeightPart | None:
    """Which rows of `whole` a published tensor is; None if it is something else than rows."""
    is_stacked = len(whole) == _STACKED
    per_expert = whole[1] if is_stacked else whole[0]
    numbers = rows.flatten().tolist()
    first, last = numbers[0], numbers[-1]
    expert, start = divmod(first, per_expert)
    end = start + len(numbers)
    plain = numbers == list(range(first, last + 1)) and end <= per_expert
    if not plain or form is None or tuple(form.shape) != (len(numbers), whole[-1]):
        return None
    return WeightPart(name, expert if is_stacked else None, start, end)


_STACKED = 3  # axes of a weight [experts, n, k]
