"""The names of a model's published weights, where transformers has others for them in memory.

transformers renames and merges weights while it loads some architectures (`transformer.h.0.ln_1` of
EXAONE is `model.layers.0.input_layernorm` in memory), and takes that back when it saves. Servers
know the published names alone. What is asked here is transformers' own way back, which
`save_pretrained` takes; there is no list of names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    where it is published in another way. `one_by_one`: by the name of all experts' weights that are
    published as one tensor, the parts by which vLLM knows single experts. `divided`: whether some
    of these are `merged` here."""

    tensors: Mapping[str, str]
    merged: Mapping[str, tuple[WeightPart, ...]] = field(default_factory=dict)
    one_by_one: Mapping[str, tuple[WeightPart, ...]] = field(default_factory=dict)
    divided: bool = False

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

    def dividing(self, wanted: Iterable[str]) -> HubNames:
        """The same, where these of the weights in `one_by_one` are stored in their parts."""
        parts = {name: self.one_by_one[name] for name in wanted if name in self.one_by_one}
        return replace(
            self,
            tensors={name: there for name, there in self.tensors.items() if name not in parts},
            merged={**self.merged, **parts},
            divided=self.divided or bool(parts),
        )

    def as_stored(self, stored: Iterable[str]) -> HubNames:
        """The same for a checkpoint that holds tensors of these names."""
        modules = {name.rpartition(".")[0] for name in stored}
        return self.dividing(
            name
            for name, parts in self.one_by_one.items()
            if parts[0].name.rpartition(".")[0] in modules
        )

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
    tensors = {name: published[id(t)] for name, t in here.items() if id(t) in published}
    return HubNames(tensors, merged, _one_by_one(model.config.model_type, here, tensors))


def _one_by_one(
    kind: str, here: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, tuple[WeightPart, ...]]:
    """Of a model of this type, the parts of every stacked weight that vLLM knows by its experts."""
    if kind not in SERVED_EXPERTS:
        return {}
    leaves, axis = SERVED_EXPERTS[kind]
    found = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if leaf not in leaves or here[name].dim() != _STACKED:
            continue
        experts, rows = len(here[name]), here[name].shape[axis] // len(leaves[leaf])
        found[name] = tuple(
            WeightPart(f"{owner}.{expert}.{part}.weight", expert, at * rows, (at + 1) * rows)
            for expert in range(experts)
            for at, part in enumerate(leaves[leaf])
        )
    return found


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
SERVED_EXPERTS: Mapping[str, tuple[Mapping[str, tuple[str, ...]], int]] = {
    "granitemoe": ({"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}, 1),
    "llama4_text": ({"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}, 2),
}
"""By model type, how vLLM calls the parts of single experts where they are published as one tensor
(model_executor/models/granitemoe.py, llama4.py), and the axis of outputs in memory. vLLM reads
quantized experts by these names alone, and transformers does not."""
