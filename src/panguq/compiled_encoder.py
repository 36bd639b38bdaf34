"""A compiled transformers model that reads its whole input at once."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from panguq.compiled_module import CompiledTransformer, as_compiled, on_cpu
from panguq.data.encoder_inputs import named_inputs, named_output, prepare_encoder
from panguq.errors import InputError


class CompiledEncoder(CompiledTransformer):
    """A compiled transformers model without a cache: an encoder, a classifier, a reranker.

    It is called like the model that it came from, and returns an output of the same class with the
    same fields.
    """

    def forward(self, *inputs: Any, return_dict: bool | None = None, **named: Any) -> Any:
        """The model's output for its inputs, in the order or by the names that it has in
        transformers; `attention_mask` `[batch, seq]` and `token_type_ids` may be left out.

        Raises InputError for what the graph cannot serve.
        """
        with as_compiled(self._device):
            results = self.executable(*self._prepared(inputs, named))
        names = self.interface.outputs
        output = named_output(self.interface.output_class, self.config, names, results)
        return self._output(output, return_dict)

    @torch.compiler.disable  # it looks at values
    def _prepared(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
        """The graph's inputs in order, where the model runs."""
        given = named_inputs(self.interface, inputs, named)
        prepared = prepare_encoder(self.interface, {k: on_cpu(x) for k, x in given.items()})
        return [x.to(self._device) for x in prepared.values()]

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises InputError: without a cache nothing is continued."""
        raise InputError(
            "this model reads its whole input at once and has no cache, so it does not generate",
            "call it with its inputs; a model whose config says is_causal: true (BERT and its kin: "
            "is_decoder) generates",
        )
