"""A compiled module: an artifact's graph, run at a stage."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx
from transformers.utils import ModelOutput

from panguq.artifact import LOWERED, Artifact
from panguq.built.buildable import Buildable
from panguq.data.inputs import check_input_dtypes, check_module_inputs
from panguq.errors import InputError
from panguq.formats.registry import find_format
from panguq.frozen_module import FrozenModule, asked_of_to
from panguq.ir.edit import clone
from panguq.kernels.ascend.device import require_device
from panguq.lowering.run.multiply_in_bfloat16 import in_bfloat16, multiply_in_bfloat16
from panguq.lowering.run.on_device import on_device
from panguq.lowering.run.prepack import prepack
from panguq.lowering.run.specialize import specialize
from panguq.lowering.targets import TARGETS, find_target

_MAKING = threading.RLock()


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
                graph = self._as_run(clone(self.graph))
                if self._multiplies_in_bfloat16():
                    multiply_in_bfloat16(graph)
                made = prepack(graph, keep_formats=on_npu)
                self._executable = on_device(made, self._device) if on_npu else made
            return self._executable

    def _multiplies_in_bfloat16(self) -> bool:
        known = TARGETS.get(self.target)  # else a file's, which need not be there any more
        if self.stage != LOWERED or self._device.type != "cpu":
            return False
        if known is not None and not known.float_follows_machine:
            return False
        return in_bfloat16(self.recipe.precision, self.interface)

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
        with as_compiled(self._device):
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
        self,
        path: str | Path,
        stage: str | None = None,
        overwrite: bool = False,
        functions: bool = False,
    ) -> None:
        """Write a stage's graph (by default the one that runs) as an ONNX file to look at.

        functions: show each layer, quantized linear, … as one box that opens on a click.
        """
        from panguq.formats.onnx.export import export_onnx

        export_onnx(self.artifact, Path(path), stage or self.stage, overwrite, functions)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"recipe={self.recipe.name}, target={self.target}, stage={self.stage}"


class CompiledTransformer(CompiledModule):
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


@contextmanager
def as_compiled(device: torch.device) -> Iterator[None]:
    """Without gradients, and in the dtypes that were compiled: autocast is switched off."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def on_cpu(given: Any) -> Any:
    """A tensor on the CPU, where all inputs are checked; anything else as it is."""
    return given.cpu() if isinstance(given, Tensor) else given
