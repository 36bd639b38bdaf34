"""An fx graph as an ONNX model: the values of the graph under their labels.

Every node of the graph is written by the emitter of its op; what depends on only stored integer
codes (layouts of kernels) is computed and stored. Weights stay where they are until the file is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import ModelProto, helper
from torch import Tensor, fx

from panguq.errors import ExportError
from panguq.formats.onnx import ascend as onnx_ascend
from panguq.formats.onnx import ascend_experts as onnx_ascend_experts
from panguq.formats.onnx import blocks as onnx_blocks
from panguq.formats.onnx import cpu as onnx_cpu
from panguq.formats.onnx import elementwise as onnx_elementwise
from panguq.formats.onnx import expert_matmuls as onnx_expert_matmuls
from panguq.formats.onnx import experts as onnx_experts
from panguq.formats.onnx import quantize as onnx_quantize
from panguq.formats.onnx import shapes as onnx_shapes
from panguq.formats.onnx.builder import MICROSOFT, OPSET, Builder, Weight
from panguq.formats.onnx.step import Emitter, Step
from panguq.formats.onnx.types import OnnxShape, carried_type, onnx_shape
from panguq.ir.edit import clone, get_tensor, label
from panguq.ir.interface import Interface
from panguq.ir.ops.opset import name_of
from panguq.ir.run.interpret import compute
from panguq.ir.text.value_types import restore_types
from panguq.ir.views import results_of

IR_VERSION = 11
EMITTERS: dict[str, Emitter] = {
    **onnx_elementwise.EMITTERS,
    **onnx_shapes.EMITTERS,
    **onnx_blocks.EMITTERS,
    **onnx_experts.EMITTERS,
    **onnx_expert_matmuls.EMITTERS,
    **onnx_quantize.EMITTERS,
    **onnx_cpu.EMITTERS,
    **onnx_ascend.EMITTERS,
    **onnx_ascend_experts.EMITTERS,
}
# Of stored tensors: done once, when the file is written.
_LAYOUTS = (
    "aten.cat.default", "aten.clone.default", "aten.contiguous.default", "aten.slice.Tensor",
    "aten.t.default", "aten.transpose.int", "aten.view.default", "npu.npu_format_cast.default",
    "panguq_npu.int4_quarters.default", "panguq_npu.int4_weight.default",
)  # fmt: skip
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)

Notes = Callable[[fx.Node], Mapping[str, str]]
"""What to write beside a node, for people: the kernel it runs and why."""


@dataclass(frozen=True)
class OnnxGraph:
    """A model without its weights, and the weights that it names."""

    model: ModelProto
    weights: tuple[Weight, ...]


def build(
    graph: fx.GraphModule,
    interface: Interface,
    name: str,
    notes: Notes | None = None,
    about: Mapping[str, str] | None = None,
) -> OnnxGraph:
    """The ONNX form of a graph that takes and returns what `interface` says.

    Raises ExportError that names op and label for what has no ONNX form.
    """
    gm = clone(graph)
    if any("val" not in n.meta for n in gm.graph.nodes if n.op == "call_function"):
        restore_types(gm, interface)
    builder = Builder(gm, taken={*interface.inputs, *interface.outputs})
    builder.taken -= set(interface.inputs)
    inputs = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            inputs.append(_input(builder, node))
        elif node.op == "get_attr":
            builder.constants[node] = _getter(gm, node)
        elif node.op == "call_function":
            _emit(builder, node, notes(node) if notes else {})
    results = _results(gm)
    if len(results) != len(interface.outputs):
        raise ExportError(
            f"the graph returns {len(results)} values, its interface names "
            f"{len(interface.outputs)}",
            "give the interface that the graph was traced with",
        )
    outputs = [
        _output(builder, node, wanted)
        for node, wanted in zip(results, interface.outputs, strict=True)
    ]
    builder.prune(interface.outputs)
    named = {value for node in builder.nodes for value in node.output}
    infos = [
        helper.make_tensor_value_info(value, elem_type, shape)
        for value, (elem_type, shape) in builder.types.items()
        if value in named and value not in interface.outputs and shape is not None
    ]
    proto = helper.make_graph(builder.nodes, name, inputs, outputs, value_info=infos)
    domains = ["", MICROSOFT] if any(n.domain == MICROSOFT for n in builder.nodes) else [""]
    versions = [helper.make_opsetid(d, OPSET if d == "" else 1) for d in domains]
    model = helper.make_model(
        proto, opset_imports=versions, ir_version=IR_VERSION, producer_name="panguq"
    )
    helper.set_model_props(model, dict(about or {}))
    return OnnxGraph(model, tuple(builder.weights.values()))


def _emit(builder: Builder, node: fx.Node, notes: Mapping[str, str]) -> None:
    op = name_of(node.target) or str(node.target)
    if op in _LAYOUTS and _reads_codes(builder, node):
        builder.constants[node] = _computed(builder, node)
        return
    emitter = EMITTERS.get(op)
    if emitter is None:
        raise ExportError(
            f"node {label(node)}: ONNX export does not know the op {op}",
            "export another stage, or add an emitter to panguq/formats/onnx",
        )
    value = emitter(Step(builder, node, notes))
    if value is not None:
        builder.values[node] = value


def _reads_codes(builder: Builder, node: fx.Node) -> bool:
    """Whether all that the node reads is stored, and integer codes."""
    sources = node.all_input_nodes
    return bool(sources) and all(
        source in builder.constants and source.meta["val"].dtype in _INTEGERS for source in sources
    )


def _getter(gm: fx.GraphModule, node: fx.Node) -> Callable[[], Tensor]:
    return lambda: get_tensor(gm, str(node.target))


def _computed(builder: Builder, node: fx.Node) -> Callable[[], Tensor]:
    def make() -> Tensor:
        environment = {source: builder.constants[source]() for source in node.all_input_nodes}
        result: Tensor = compute(builder.gm, node, environment)
        return result

    return make


def _input(builder: Builder, node: fx.Node) -> Any:
    name = builder.unique(str(node.target))
    builder.set_type(name, node, node.meta["val"])
    builder.values[node] = name
    return helper.make_tensor_value_info(name, *builder.types[name])


def _results(gm: fx.GraphModule) -> Sequence[fx.Node]:
    return results_of(gm)


def _output(builder: Builder, node: fx.Node, wanted: str) -> Any:
    value = builder.value(node)
    if not isinstance(value, str):
        raise ExportError(f"node {label(node)} is returned, and has several results")
    builder.add_node("Identity", [value], [wanted], "", {"panguq.label": "output"}, {})
    shape: OnnxShape = onnx_shape(node.meta["val"], builder.gm.meta.get("symbol_names", {}))
    elem_type = carried_type(node.meta["val"].dtype, label(node))
    return helper.make_tensor_value_info(wanted, elem_type, shape)
