"""A compiled model: called like the transformers model it came from, generates like one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from panguq.errors import InputError, PanguqError
from panguq.inputs import prepare, takes_empty_mask
from panguq.ir.edit import clone
from panguq.ir.interface import Interface
from panguq.ir.size_expression import evaluate, names_in
from panguq.kernels.ascend.device import require_device
from panguq.kv_cache import cache_name, layer_tensors, make_cache, update_cache
from panguq.lowering.on_device import on_device
from panguq.lowering.prepack import prepack
from panguq.lowering.specialize import specialize
from panguq.lowering.targets import find_target
from panguq.recipe import Recipe
from panguq.report.compile_report import CompileReport
from panguq.suggest import did_you_mean

LOWERED = "lowered"


class CompiledModule(nn.Module):
    """The graphs of one compile and what is needed to run, inspect and save them.

    `stages` maps a stage's name (`fake-quant`, `lowered`) to its graph; the stages share
    their weights. The model runs `stage`.
    """

    def __init__(
        self,
        stages: Mapping[str, fx.GraphModule],
        interface: Interface,
        recipe: Recipe,
        target: str,
        report: CompileReport,
        stage: str = LOWERED,
    ) -> None:
        super().__init__()
        if stage not in stages:
            raise PanguqError(
                f"there is no stage {stage!r} in this compiled model",
                f"the stages are {', '.join(stages)}",
            )
        object.__setattr__(self, "stages", dict(stages))
        self.stages: dict[str, fx.GraphModule]
        self.interface = interface
        self.recipe = recipe
        self.target = target
        self.report = report
        self.stage = stage
        self._executable: fx.GraphModule | None = None
        self._device = torch.device("cpu")
        self.requires_grad_(False)

    @property
    def graph(self) -> fx.GraphModule:
        """The graph of this model's stage, as dumped and saved."""
        return self.stages[self.stage]

    @property
    def executable(self) -> fx.GraphModule:
        """The graph that runs: weights in the layouts that the kernels read. Made once."""
        if self._executable is None:
            on_npu = self._device.type != "cpu"
            self._executable = prepack(clone(self.graph), keep_formats=on_npu)
            if on_npu:
                on_device(self._executable, self._device)
        return self._executable

    def to(self, device: str | torch.device) -> Self:  # type: ignore[override]
        """This model, to be run on `device` from now on: `cpu`, or `npu` for Ascend targets.

        Raises InputError for a device that the model's target does not run on, LoweringError if
        torch_npu or an NPU is missing.
        """
        kind = str(device).partition(":")[0]
        if kind == "npu":
            if find_target(self.target).kind != "ascend":
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
        return self

    def specialize(self, m: int) -> Self:
        """This model for m = batch * seq tokens a call: no node chooses a kernel at run time.

        Raises LoweringError for an m that is no positive integer.
        """
        graphs = {name: specialize(graph, m) for name, graph in self.stages.items()}
        return type(self)(
            graphs,
            self.interface,
            self.recipe,
            self.target,
            self.report,
            self.stage,
            **self._extras(),
        )

    def at_stage(self, stage: str) -> Self:
        """The same compile, run at another stage."""
        return type(self)(
            self.stages,
            self.interface,
            self.recipe,
            self.target,
            self.report,
            stage,
            **self._extras(),
        )

    def _extras(self) -> dict[str, Any]:
        return {}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the graph on the inputs that the source module took when it was traced."""
        check_module_inputs(self.interface, inputs)
        with torch.no_grad():
            results = self.executable(*(x.to(self._device) for x in inputs))
        return results[0] if self.interface.returns == "tensor" else results

    def save(self, path: str | Path, overwrite: bool = False, format: str = "panguq") -> None:
        """Write the model as a folder, whole or not at all.

        format: `panguq`, safetensors and json for `panguq.load`; `compressed-tensors`, for
            transformers, vLLM and vllm-ascend; `ascend`, msModelSlim's format, for vllm-ascend
            and MindIE. Raises PanguqError for what a format cannot express, naming the server
            that would refuse it, and StorageError for a folder that cannot be written.
        """
        save = _writer(format)
        save(self, Path(path), overwrite)

    def export_onnx(
        self, path: str | Path, stage: str | None = None, overwrite: bool = False
    ) -> None:
        """Write a stage's graph (by default the one that runs) as an ONNX file to look at."""
        from panguq.export.onnx_export import export_onnx

        export_onnx(self, Path(path), stage or self.stage, overwrite)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"recipe={self.recipe.name}, target={self.target}, stage={self.stage}"


class CompiledCausalLM(CompiledModule, GenerationMixin):
    """A compiled causal language model with transformers' calling convention and `generate`."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True

    def __init__(
        self,
        stages: Mapping[str, fx.GraphModule],
        interface: Interface,
        recipe: Recipe,
        target: str,
        report: CompileReport,
        stage: str = LOWERED,
        *,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(stages, interface, recipe, target, report, stage)
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self.tokenizer = tokenizer
        self.empty_mask = takes_empty_mask(self.graph)

    def _extras(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "generation_config": self.generation_config,
            "tokenizer": self.tokenizer,
        }

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the model's activations."""
        return getattr(torch, self.interface.float_dtype)

    @classmethod
    def is_remote_code(cls) -> bool:
        """It is not; `generate` asks."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """There is none to switch; `generate` asks."""
        return {}

    def can_generate(self) -> bool:
        """It can."""
        return True

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
        cache: Any = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[batch, kept, vocab]` and the grown cache for token ids `[batch, seq]`.

        `cache` (`past_key_values` to transformers before 5.24; both names work) is what an earlier
        call returned, and is updated in place, as transformers' models do; `attention_mask`
        `[batch, past + seq]`. Raises InputError for what the graph cannot serve.
        """
        if cache is not None and past_key_values is not None:
            raise InputError("cache and past_key_values are both given", "they are one thing")
        given = past_key_values if cache is None else cache
        refused = sorted(
            name for name, value in unused.items() if value is not None and value is not False
        )
        if refused:
            raise InputError(
                f"a compiled model does not take {', '.join(refused)}",
                "its graph has token ids, mask, positions and cache as inputs",
            )
        if given is not None and not isinstance(given, DynamicCache):
            raise InputError(
                f"{cache_name()} is a {type(given).__name__}",
                "use transformers' DynamicCache, the default of generate",
            )
        past = layer_tensors(given) if given is not None else []
        inputs = prepare(
            self.interface,
            _on_cpu(input_ids),
            _on_cpu(attention_mask),
            _on_cpu(position_ids),
            past,
            logits_to_keep,
            empty_mask=self.empty_mask,
        )
        with torch.no_grad():
            logits, *grown = self.executable(*(x.to(self._device) for x in inputs.values()))
        held = None
        if given is not None:
            held = update_cache(given, grown)
        elif use_cache is None or use_cache:
            held = make_cache(grown)
        output = CausalLMOutputWithPast(**{"logits": logits, cache_name(): held})
        return output if return_dict else output.to_tuple()


FORMATS = ("panguq", "compressed-tensors", "ascend")


def _writer(format: str) -> Callable[[Any, Path, bool], None]:
    if format == "panguq":
        from panguq.model_folder import save_model

        return save_model
    if format == "compressed-tensors":
        from panguq.export.compressed_tensors import save_compressed_tensors

        return save_compressed_tensors
    if format == "ascend":
        from panguq.export.ascend_v1 import save_ascend_v1

        return save_ascend_v1
    raise InputError(
        f"unknown format {format!r} of a saved model", did_you_mean(format, FORMATS, "formats")
    )


def _on_cpu(given: Any) -> Any:
    """What a user passes is checked on the CPU, wherever the model runs."""
    return given.cpu() if isinstance(given, Tensor) else given


def check_module_inputs(interface: Interface, inputs: tuple[Tensor, ...]) -> None:
    """Raises InputError for another number or other shapes of tensors than the graph takes."""
    if len(inputs) != len(interface.inputs):
        raise InputError(
            f"{len(inputs)} inputs given, the module takes {len(interface.inputs)}",
            f"give {', '.join(interface.inputs)}",
        )
    sizes: dict[str, int] = {}
    for name, tensor in zip(interface.inputs, inputs, strict=True):
        shape = interface.input_shapes[name]
        if tensor.dim() != len(shape):
            raise InputError(f"input {name} has {tensor.dim()} dimensions, expected {len(shape)}")
        for size, wanted in zip(tensor.shape, shape, strict=True):
            sizes.setdefault(str(wanted), size)
    for name, (least, largest) in interface.size_limits.items():
        size = sizes.get(name, least)
        if size < least or (largest is not None and size > largest):
            raise InputError(
                f"size {name} is {size}, the trace holds for {least} to {largest or 'any size'}",
                "the module branches on this size; compile again with other example inputs",
            )
    for name, tensor in zip(interface.inputs, inputs, strict=True):
        shape = interface.input_shapes[name]
        for index, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
            known = all(part in sizes for part in names_in(str(wanted)))
            expected = evaluate(str(wanted), sizes) if known else size
            if size != expected:
                raise InputError(
                    f"dimension {index} of input {name} is {size}, the graph serves {expected}",
                    f"the traced shape is {list(shape)}; compile again with other example inputs",
                )
