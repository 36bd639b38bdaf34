"""What transformers expects of a model that generates, answered by a compiled one.

`generate`, pipelines and evaluation harnesses ask for more than logits: embeddings, the number of
parameters, masks for a cache. A compiled model refuses before any work what its graph cannot give.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import Tensor, fx, nn, ops
from transformers import GenerationConfig, GenerationMixin
from transformers.models.auto import modeling_auto

from panguq.errors import InputError, PanguqError
from panguq.ir.call_arguments import operand
from panguq.ir.edit import get_tensor
from panguq.ir.interface import Interface
from panguq.ir.kv_cache import CACHE_NAME, check_cache
from panguq.ir.views import Linear, results_of

NO_PART_OF_A_GRAPH = (
    "output_attentions", "output_hidden_states", "inputs_embeds", "assistant_early_exit",
)  # fmt: skip
NO_CACHE_LIKE_THAT = ("offloaded", "offloaded_static", "quantized", "paged")
# Pipelines look up here, by class name, which models they serve.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["panguq"] = "CompiledCausalLM"
CHANGE_THE_SOURCE = "change the source model, then compile it again"


class Generates(GenerationMixin):
    """A graph in the place of a transformers model; a subclass has these attributes, `config`, and
    a forward of transformers' convention."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    input_modalities = ("text",)
    _is_stateful = False
    _supports_cache_class = True

    stages: dict[str, fx.GraphModule]
    stage: str
    interface: Interface
    generation_config: GenerationConfig

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises InputError for an option that the graph cannot serve."""
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        self._check_options(kwargs, given or self.generation_config)
        for name in ("cache", "past_key_values"):
            if kwargs.get(name) is not None:
                check_cache(kwargs[name], self.interface.cache)
                kwargs[CACHE_NAME] = kwargs.pop(name)
        return super().generate(*args, **kwargs)

    @staticmethod
    def _check_options(options: dict[str, Any], config: GenerationConfig) -> None:
        for name in NO_PART_OF_A_GRAPH:
            value = options.get(name, getattr(config, name, None))
            if value is not None and value is not False:
                raise InputError(
                    f"generate does not take {name} of a compiled model",
                    "its graph has token ids as input, logits and the cache as outputs; ask the "
                    "source model for the rest",
                )
        kind = options.get("cache_implementation") or config.cache_implementation
        if kind in NO_CACHE_LIKE_THAT:
            raise InputError(
                f"cache_implementation={kind!r} does not go with a compiled model",
                "leave it out, or give 'dynamic' or 'static'; a recipe with the pass "
                "quantize-kv-cache gives an int8 cache",
            )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; tokenizers, which only stopping criteria read, go no further."""
        kwargs = {k: v for k, v in kwargs.items() if k not in ("tokenizer", "assistant_tokenizer")}
        return super().prepare_inputs_for_generation(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Any = None, **unused: Any) -> Any:
        """The mask as it is, `[batch, past + seq]`: the graph's own mask is made of that."""
        return attention_mask

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises InputError: continuous batching reaches into attention modules."""
        raise InputError(
            "a compiled model does not serve continuous batching",
            "use generate, or a server that reads what compiled.save(folder, format=...) writes",
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    @classmethod
    def can_generate(cls) -> bool:
        """True: `generate` asks."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """False: no code of a model is loaded. `generate` asks."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Empty: a graph's experts cannot be switched. `generate` asks."""
        return {}

    @property
    def name_or_path(self) -> str:
        """Where the source model came from, as its config says."""
        return str(getattr(self.config, "_name_or_path", ""))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers are stored, codes and scales among them; none is trainable."""
        if only_trainable:
            return 0
        skipped = self._input_embedding() if exclude_embeddings else None
        parameters = dict(self.named_parameters())
        return sum(p.numel() for name, p in parameters.items() if name != skipped)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: what was tied in the source model is one tensor in the graph."""

    def get_input_embeddings(self) -> nn.Module:
        """The table that token ids look up. Raises InputError if it is not one float table."""
        name = self._input_embedding()
        if name is None:
            raise InputError("the graph has no float table of input embeddings", CHANGE_THE_SOURCE)
        return nn.Embedding.from_pretrained(get_tensor(self.stages[self.stage], name), freeze=True)

    def _input_embedding(self) -> str | None:
        for node in self.stages[self.stage].graph.nodes:
            if node.target is ops.aten.embedding.default:
                table, ids = operand(node, 0), operand(node, 1)
                if ids.target == "input_ids":
                    return str(table.target) if table.op == "get_attr" else None
        return None

    def get_output_embeddings(self) -> nn.Module:
        """The matmul that gives the logits. Raises InputError if it is not a float one."""
        gm = self.stages[self.stage]
        for linear in filter(None, map(Linear.match, gm.graph.nodes)):
            if linear.is_stored and _gives_logits(gm, linear.node):
                read = [node for node in (linear.weight, linear.bias) if node is not None]
                return _linear(*(get_tensor(gm, str(node.target)) for node in read))
        raise InputError("the matmul that gives the logits is not a float one", CHANGE_THE_SOURCE)

    def set_input_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises InputError: the graph is fixed."""
        raise InputError("a compiled model's embeddings are fixed", CHANGE_THE_SOURCE)

    set_output_embeddings = resize_token_embeddings = set_input_embeddings

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises InputError: there are no gradients."""
        raise InputError("a compiled model is not trained", CHANGE_THE_SOURCE)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises PanguqError that says how a compiled model is saved."""
        raise PanguqError(
            "a compiled model is not saved as a transformers checkpoint by save_pretrained",
            "compiled.save(folder) writes what panguq.load reads; with "
            "format='compressed-tensors' transformers and vLLM read it",
        )

    push_to_hub = save_pretrained

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises PanguqError that says how a compiled model is loaded."""
        raise PanguqError(
            f"{cls.__name__}.from_pretrained reads nothing",
            "panguq.load(folder) reads what compiled.save(folder) wrote",
        )


def _gives_logits(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the graph's first output is this node's value, perhaps reshaped or converted."""
    value = results_of(gm)[0]
    while value is not node and len(value.all_input_nodes) == 1:
        value = value.all_input_nodes[0]
    return value is node


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made
