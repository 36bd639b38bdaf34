"""A compiled model: called like the transformers model it came from, generates like one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, fx
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from panguq.artifact import LOWERED, Artifact
from panguq.built.buildable import Buildable
from panguq.data.encoder_inputs import named_inputs, named_output, prepare_encoder
from panguq.data.inputs import (
    check_ids,
    check_input_dtypes,
    check_module_inputs,
    joined_logits,
    past_length,
    prepare,
    takes_empty_mask,
)
from panguq.errors import InputError
from panguq.formats.registry import find_format
from panguq.frozen_module import FrozenModule, asked_of_to
from panguq.generation import Generates
from panguq.ir.cache_memory import remember, with_memory
from panguq.ir.edit import clone
from panguq.ir.kv_cache import CACHE_NAME, check_cache, held_tensors, make_cache, update_cache
from panguq.kernels.ascend.device import require_device
from panguq.lowering.run.on_device import on_device
from panguq.lowering.run.prepack import prepack
from panguq.lowering.run.specialize import specialize
from panguq.lowering.run.write_into_cache import write_into_cache, written_into
from panguq.lowering.targets import find_target

_MAKING = threading.RLock()
PREFILL_CHUNK = 2048
"""The most tokens of each sequence that a graph reads at once; a longer prompt is read in parts."""


class CompiledModule(Buildable, FrozenModule):
    """A module that runs a stage of a compile's `Artifact`."""

    def __init__(self, artifact: Artifact, stage: str = LOWERED) -> None:
        artifact.graph(stage)
        super().__init__(artifact.stages)
        self.interface = artifact.interface
        self.recipe = artifact.recipe
        self.target = artifact.target
        self.report = artifact.report
        self.stage = stage
        self._device = torch.device("cpu")

    @property
    def artifact(self) -> Artifact:
        """What this model runs, as one value, to be written."""
        return Artifact(self.stages, self.interface, self.recipe, self.target, self.report)

    @property
    def graph(self) -> fx.GraphModule:
        """The graph of this model's stage, as dumped and saved."""
        return self.stages[self.stage]

    def _use(self, stages: dict[str, fx.GraphModule]) -> None:
        super()._use(stages)
        self._executable: fx.GraphModule | None = None
        self._forget_built()

    @property
    def executable(self) -> fx.GraphModule:
        """The graph that runs: weights in the layouts that the kernels read. Made once."""
        return self._executable or self._make_executable()

    @torch.compiler.disable
    def _make_executable(self) -> fx.GraphModule:
        with _MAKING:  # one thread makes it, the others wait
            if self._executable is None:
                on_npu = self._device.type != "cpu"
                made = prepack(self._as_run(clone(self.graph)), keep_formats=on_npu)
                self._executable = on_device(made, self._device) if on_npu else made
            return self._executable

    def _as_run(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A subclass says how it calls the graph that runs, if not as the saved one."""
        return gm

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the model's activations."""
        return getattr(torch, self.interface.float_dtype)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """This model, to be run on a device from now on: `cpu`, or `npu` for Ascend targets.

        Takes what torch's `to` takes. Raises InputError for a device that the model's target does
        not run on and for another dtype than the model's, LoweringError if torch_npu or an NPU is
        missing.
        """
        device, dtype = asked_of_to(args, kwargs)
        if dtype is not None and dtype != self.dtype:
            raise InputError(
                f"the model is compiled for {self.dtype} and does not become {dtype}",
                f"compile it again: panguq.compile(model.to({dtype}), ...), or with dtype=",
            )
        return self if device is None else self._to_device(device)

    def _to_device(self, device: str | torch.device) -> Self:
        kind = str(device).partition(":")[0]
        if kind == "npu":
            if kind not in find_target(self.target).devices:
                raise InputError(
                    f"a model compiled for {self.target} does not run on {device}",
                    "compile it with target='ascend910b1' (b2, b3, b4)",
                )
            require_device()  # without torch_npu, torch knows no such device
        elif kind != "cpu":
            raise InputError(f"compiled models do not run on {device}", "the devices: cpu, npu")
        place = torch.device(device)
        if place != self._device:
            self._device, self._executable = place, None
            self._forget_built()
        return self

    def specialize(self, m: int) -> Self:
        """This model for m = batch * seq tokens a call: no node chooses a kernel at run time.

        Raises LoweringError for an m that is no positive integer.
        """
        graphs = {name: specialize(graph, m) for name, graph in self.stages.items()}
        return self._with(replace(self.artifact, stages=graphs), self.stage)

    def at_stage(self, stage: str) -> Self:
        """The same compile, run at another stage."""
        return self._with(self.artifact, stage)

    def __copy__(self) -> Self:
        """The same compile, as a second object."""
        return self._with(self.artifact, self.stage)

    def _copied(self, stages: dict[str, fx.GraphModule], memo: dict[int, Any]) -> Self:
        own = ("report", "config", "generation_config", "tokenizer")
        copies = {name: copy.deepcopy(getattr(self.artifact, name), memo) for name in own}
        return self._with(replace(self.artifact, stages=stages, **copies), self.stage)

    def _with(self, artifact: Artifact, stage: str) -> Self:
        made = type(self)(artifact, stage)
        made._device = self._device
        return made

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the graph on the inputs that the source module took when it was traced."""
        check_module_inputs(self.interface, inputs)
        check_input_dtypes(self.graph, inputs)
        with _as_compiled(self._device):
            results = self.executable(*(x.to(self._device) for x in inputs))
        return results[0] if self.interface.returns == "tensor" else results

    def save(self, path: str | Path, overwrite: bool = False, format: str = "panguq") -> None:
        """Write the model as a folder, whole or not at all.

        format: `panguq`, safetensors and json for `panguq.load`; `compressed-tensors`, for
            transformers, vLLM and vllm-ascend; `ascend`, msModelSlim's format, for vllm-ascend
            and MindIE. Raises PanguqError for what a format cannot express, naming the server
            that would refuse it, and StorageError for a folder that cannot be written.
        """
        find_format(format).write(self.artifact, Path(path), overwrite)

    def export_onnx(
        self, path: str | Path, stage: str | None = None, overwrite: bool = False
    ) -> None:
        """Write a stage's graph (by default the one that runs) as an ONNX file to look at."""
        from panguq.formats.onnx.export import export_onnx

        export_onnx(self.artifact, Path(path), stage or self.stage, overwrite)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"recipe={self.recipe.name}, target={self.target}, stage={self.stage}"


class _CompiledTransformer(CompiledModule):
    """What compiled models of transformers share: a configuration, and perhaps a tokenizer."""

    def __init__(self, artifact: Artifact, stage: str = LOWERED) -> None:
        super().__init__(artifact, stage)
        self.config = artifact.config
        self.generation_config = artifact.generation_config
        self.tokenizer = artifact.tokenizer

    @property
    def artifact(self) -> Artifact:
        """What this model runs, as one value, to be written."""
        return replace(
            super().artifact,
            config=self.config,
            generation_config=self.generation_config,
            tokenizer=self.tokenizer,
        )

    def _output(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output in the form that was asked for, by default the config's."""
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()


class CompiledEncoder(_CompiledTransformer):
    """A compiled transformers model without a cache: an encoder, a classifier, a reranker.

    It is called like the model that it came from, and returns an output of the same class with the
    same fields.
    """

    def forward(self, *inputs: Any, return_dict: bool | None = None, **named: Any) -> Any:
        """The model's output for its inputs, in the order or by the names that it has in
        transformers; `attention_mask` `[batch, seq]` and `token_type_ids` may be left out.

        Raises InputError for what the graph cannot serve.
        """
        with _as_compiled(self._device):
            results = self.executable(*self._prepared(inputs, named))
        names = self.interface.outputs
        output = named_output(self.interface.output_class, self.config, names, results)
        return self._output(output, return_dict)

    @torch.compiler.disable  # it looks at values
    def _prepared(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
        """The graph's inputs in order, where the model runs."""
        given = named_inputs(self.interface, inputs, named)
        prepared = prepare_encoder(self.interface, {k: _on_cpu(x) for k, x in given.items()})
        return [x.to(self._device) for x in prepared.values()]

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises InputError: without a cache nothing is continued."""
        raise InputError(
            "this model reads its whole input at once and has no cache, so it does not generate",
            "call it with its inputs; a model whose config says is_causal: true (BERT and its kin: "
            "is_decoder) generates",
        )


class CompiledCausalLM(_CompiledTransformer, Generates):
    """A compiled causal language model with transformers' calling convention and `generate`."""

    def __init__(self, artifact: Artifact, stage: str = LOWERED) -> None:
        super().__init__(artifact, stage)
        self.generation_config = artifact.generation_config or GenerationConfig.from_model_config(
            artifact.config
        )
        self.empty_mask = takes_empty_mask(self.graph)

    def _as_run(self, gm: fx.GraphModule) -> fx.GraphModule:
        if self._device.type == "cpu":
            write_into_cache(gm, self.interface)
        return gm

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Any = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[batch, kept, vocab]` and the grown cache for token ids `[batch, seq]`.

        `cache` (`past_key_values` to transformers before 5.24; both names work) is what an earlier
        call returned, or transformers' DynamicCache or StaticCache, and is updated in place, as
        transformers' models do; `attention_mask` `[batch, past + seq]`. Without `use_cache` and
        `return_dict` the config decides. Raises InputError for what the graph cannot serve.
        """
        if cache is not None and past_key_values is not None:
            raise InputError("cache and past_key_values are both given", "they are one thing")
        given = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True)
        keeps = bool(use_cache) or given is not None
        parts = self._parts(input_ids)
        logits: list[Tensor] = []
        memory: list[Tensor] = []
        grown: list[Tensor] = []
        for tokens in parts:
            inputs = self._prepared(
                input_ids, attention_mask, position_ids, given, logits_to_keep, keeps, unused,
                tokens, memory,
            )  # fmt: skip
            with _as_compiled(self._device):
                found, *grown = self._running()(*inputs)
            logits.append(found)
            memory = self._continued(inputs, grown)
        held = self._kept(given, grown, memory, input_ids.shape[1]) if keeps else None
        whole = logits[0] if len(parts) == 1 else joined_logits(logits, parts, logits_to_keep)
        output = CausalLMOutputWithPast(**{"logits": whole, CACHE_NAME: held})
        return self._output(output, return_dict)

    @torch.compiler.disable
    def _parts(self, input_ids: Any) -> list[tuple[int, int]]:
        """The new tokens in parts of at most `PREFILL_CHUNK`, each a first number and one behind:
        what a part computes is forgotten before the next, so that memory grows with the length."""
        seq = input_ids.shape[1] if isinstance(input_ids, Tensor) and input_ids.dim() == 2 else 0
        whole = seq <= PREFILL_CHUNK or not written_into(self.executable)
        step = max(seq, 1) if whole else PREFILL_CHUNK
        return [(start, min(start + step, seq)) for start in range(0, max(seq, 1), step)]

    def _continued(self, inputs: list[Any], grown: list[Tensor]) -> list[Tensor]:
        """What the next part finds in the cache: the memory that was written into, and states."""
        names = written_into(self.executable)
        pairs = zip(self.interface.cache_pairs(), inputs[4:], grown, strict=False)
        return [memory if name in names else state for name, memory, state in pairs]

    @torch.compiler.disable  # it looks at values
    def _prepared(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        logits_to_keep: int | Tensor,
        keeps: bool,
        unused: dict[str, Any],
        tokens: tuple[int, int],
        memory: list[Tensor],
    ) -> list[Any]:
        """The inputs of the graph that runs, in order, where it runs, for a part of the tokens.

        `memory` is what the parts before it left, if there were any.
        """
        refused = sorted(
            name for name, value in unused.items() if value is not None and value is not False
        )
        if refused:
            raise InputError(
                f"a compiled model does not take {', '.join(refused)}",
                "its graph has token ids, mask, positions and cache as inputs",
            )
        past: list[Tensor] = []
        if cache is not None:
            check_cache(cache, self.interface.cache)
            new = check_ids(self.interface, _on_cpu(input_ids)).shape[1]
            past = held_tensors(self.interface.cache, cache, new)
        inputs = prepare(
            self.interface,
            _on_cpu(input_ids),
            _on_cpu(attention_mask),
            _on_cpu(position_ids),
            past,
            logits_to_keep,
            empty_mask=self.empty_mask,
            tokens=tokens,
        )
        if self._device.type != "cpu":
            return [x.to(self._device) for x in inputs.values()]
        others, past = list(inputs.values())[:4], list(inputs.values())[4:]
        names = written_into(self.executable)
        if not names:
            return [*others, *past]
        length = past_length(self.interface, past) + tokens[0]
        if not memory:
            room = input_ids.shape[1]
            memory = with_memory(self.interface.cache, cache, past, names, room, spare=keeps)
        return [*others, *memory, length]

    @torch.compiler.disable
    def _kept(self, cache: Any, grown: list[Tensor], memory: list[Tensor], new: int) -> Any:
        """The cache to return, which holds `grown`, the last `new` tokens of them new."""
        layers = self.interface.cache
        if cache is None:
            cache = make_cache(layers, grown)
        else:
            update_cache(cache, layers, grown, new)
        remember(layers, cache, memory)
        return cache


def compiled_model(artifact: Artifact, stage: str = LOWERED) -> CompiledModule:
    """The model that runs this artifact: a `CompiledCausalLM` for a causal language model, a
    `CompiledEncoder` for another model of transformers."""
    return _KINDS.get(artifact.interface.kind, CompiledModule)(artifact, stage)


_KINDS = {"causal_lm": CompiledCausalLM, "encoder": CompiledEncoder}


def load(path: str | Path, stage: str = LOWERED) -> CompiledModule:
    """The compiled model in a folder that `save` wrote, to be run at `stage`.

    Weights are memory-mapped. A model of transformers comes back as a `CompiledCausalLM` or a
    `CompiledEncoder`, with its tokenizer if it was saved with one. Raises StorageError, naming the
    file, for anything missing, truncated, changed or from elsewhere.
    """
    from panguq.formats.own.model_folder import read_model

    return compiled_model(read_model(path), stage)


@contextmanager
def _as_compiled(device: torch.device) -> Iterator[None]:
    """Without gradients, and in the dtypes that were compiled: autocast is switched off."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _on_cpu(given: Any) -> Any:
    """A tensor on the CPU, where all inputs are checked; anything else as it is."""
    return given.cpu() if isinstance(given, Tensor) else given
