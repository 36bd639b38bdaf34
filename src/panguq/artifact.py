"""What a compile yields: one value, which formats write and a compiled model runs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from panguq.compile_report import CompileReport
from panguq.errors import PanguqError, VerifyError
from panguq.ir.edit import weights_of
from panguq.ir.interface import Interface
from panguq.recipe import Recipe

logger = logging.getLogger("panguq")
FAKE_QUANT, LOWERED = "fake-quant", "lowered"
Place = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


@dataclass(frozen=True)
class Artifact:
    """The graphs of one compile and what is needed to run, inspect and write them.

    `stages` maps a stage's name (`fake-quant`, `lowered`) to its graph; the stages share their
    weights. A model of transformers has a `config` of it, and a `tokenizer` if one was given; a
    causal language model a `generation_config`, too; other modules have none.
    """

    stages: Mapping[str, fx.GraphModule]
    interface: Interface
    recipe: Recipe
    target: str
    report: CompileReport
    config: Any = None
    generation_config: Any = None
    tokenizer: Any = None

    def of(self, model: Any, tokenizer: Any) -> Artifact:
        """This artifact as that of a transformers model, with what is saved along.

        The configuration has the vocabulary that the embedding has, and names the model's class. A
        tokenizer that cannot be
        saved is left out, which is said.
        """
        config = copy.deepcopy(model.config)
        if self.interface.vocab_size is not None:
            config.get_text_config(decoder=True).vocab_size = self.interface.vocab_size
        is_part = config.get_text_config() is not config
        if self.interface.kind == "encoder" or (is_part and not config.architectures):
            config.architectures = [type(model).__name__]
        if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
            logger.warning(
                "the tokenizer, a %s, is not saved with the model: only those of transformers are",
                type(tokenizer).__name__,
            )
            tokenizer = None
        return replace(
            self,
            config=config,
            generation_config=copy.deepcopy(getattr(model, "generation_config", None)),
            tokenizer=tokenizer,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the model's activations."""
        return getattr(torch, self.interface.float_dtype)

    def graph(self, stage: str) -> fx.GraphModule:
        """A stage's graph. Raises PanguqError, naming the stages, if there is none of that name."""
        if stage not in self.stages:
            raise PanguqError(
                f"there is no stage {stage!r} in this compiled model",
                f"the stages are {', '.join(self.stages)}",
            )
        return self.stages[stage]


def shared_weights(stages: Mapping[str, fx.GraphModule]) -> dict[str, Tensor]:
    """The weights of all stages by name. Raises VerifyError if a name means two tensors."""
    weights: dict[str, Tensor] = {}
    for stage, graph in stages.items():
        for name, tensor in weights_of(graph).items():
            known = weights.setdefault(name, tensor)
            if known is not tensor and place_of(known) != place_of(tensor):
                raise VerifyError(
                    f"weight {name} of stage {stage} is not the one that another stage has",
                    "a pass replaced it after the stages parted; it must take a new name",
                )
    return weights


def place_of(tensor: Tensor) -> Place:
    """Where and how a tensor lies in memory: equal for two views of the same elements."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
