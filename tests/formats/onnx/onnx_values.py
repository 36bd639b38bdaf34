"""Every value of an exported file beside what PyTorch's op makes of the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from panguq.decibels import sqnr_db
from panguq.evaluation import Perplexity, evaluate, logits_of
from panguq.formats.onnx.run import OnnxModel
from panguq.ir.edit import get_tensor, label
from panguq.ir.interface import Interface


def all_values(path: Path, interface: Interface, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What onnxruntime computes for each value that the file gives a type for."""
    model = onnx.load(str(path))
    known = {value.name for value in model.graph.output}
    for info in model.graph.value_info:
        if info.name not in known and info.type.tensor_type.elem_type != onnx.TensorProto.INT4:
            model.graph.output.append(info)
    exposed = path.with_name("all_values.onnx")
    onnx.save(model, str(exposed))
    return OnnxModel(exposed, interface).run(inputs)


def local_differences(
    gm: fx.GraphModule, interface: Interface, path: Path, inputs: Mapping[str, Tensor]
) -> dict[str, float]:
    """SQNR in dB of each float value, and of codes the share that differs, as a negative number.

    Each op of the graph is given what onnxruntime computed, so that errors do not add up.
    """
    found = all_values(path, interface, inputs)
    environment: dict[fx.Node, Any] = {}
    result: dict[str, float] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            environment[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            environment[node] = get_tensor(gm, str(node.target))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: environment[n])
            computed = node.target(*args, **kwargs)
            environment[node] = computed
            name = label(node)
            if isinstance(computed, Tensor) and name in found:
                result[name] = _difference(computed, found[name])
                environment[node] = found[name].to(computed.dtype)
    return result


def _difference(computed: Tensor, found: Tensor) -> float:
    assert computed.shape == found.shape
    if computed.is_floating_point():
        return sqnr_db(computed.float(), found)
    return -float((computed != found).float().mean())


def is_matmul(node: fx.Node) -> bool:
    """Whether a node multiplies activations with weights."""
    name = str(node.target)
    return "linear" in name or "matmul" in name or torch.ops.aten.linear.default is node.target


def perplexities_with_onnx(compiled: Any, folder: Path, held_out: Tensor) -> dict[str, float]:
    """Perplexity over token windows `[windows, seq]` in onnxruntime, "onnx", and in "pytorch"."""
    compiled.export_onnx(folder / "model.onnx")
    found = OnnxModel(folder / "model.onnx", compiled.interface)
    models = {"onnx": lambda x: found.logits(x)[0], "pytorch": logits_of(compiled)}
    results = evaluate(models, held_out, metrics=[Perplexity])
    return {name: result["perplexity"] for name, result in results.items()}
