"""ONNX local functions: the nodes of an op, and of a layer, as one box that opens on a click.

What is computed stays the same: onnxruntime puts the bodies back in place before it optimizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from onnx import FunctionProto, GraphProto, NodeProto, TensorProto, helper

from panguq.formats.onnx.builder import Weight, names_read
from panguq.formats.onnx.model import OnnxGraph

DOMAIN = "panguq"
_NAMES = {
    "rotary": "Rotary",
    "attention": "Attention",
    "swiglu": "SwiGLU",
    "rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
    "sym_size": "Size",
}
_LAYER = re.compile(r"(.*?\.\d+)(?=[.:]|$)")
_OF_THE_WHOLE = ("panguq.label", "panguq.op", "panguq.module")


def fold_into_functions(graph: OnnxGraph) -> OnnxGraph:
    """Before: every node of the model, five for a quantized linear.  After: calls of functions.

    - What was written for one op of the graph becomes a call named like the op: `Rotary`,
      `QuantizedLinear_W4A16`, …; its metadata stays with the call.
    - The nodes of each numbered module (`model.layers.3`) then become a call of `Layer`, or
      `Layer_2` where layers differ. Layers of one structure share the function; their weights are
      its inputs. A module whose nodes do not follow each other is left as it is.

    Axes and shapes lie in the functions that read them. Functions are of the domain `panguq`.
    """
    model = graph.model
    integers = {w.name: w for w in graph.weights if w.elem_type == TensorProto.INT64}
    made = _Functions({name: _constant(weight) for name, weight in integers.items()})
    outputs = [value.name for value in model.graph.output]
    nodes = list(model.graph.node)
    nodes = _folded(nodes, outputs, _op_of, made, _call_of_op)
    nodes = _folded(nodes, outputs, _layer_of, made, _call_of_layer)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    shown = {value for node in nodes for value in node.output}
    infos = [info for info in model.graph.value_info if info.name in shown]
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    if made.functions:
        imports = [*model.opset_import, helper.make_opsetid(DOMAIN, 1)]
        for function in made.functions:
            function.opset_import.extend(imports)
        model.functions.extend(made.functions)
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    read = {value for node in nodes for value in names_read(node)}
    return OnnxGraph(model, tuple(weight for weight in graph.weights if weight.name in read))


def _constant(weight: Weight) -> NodeProto:
    values = weight.make().flatten().tolist()
    tensor = helper.make_tensor("value", weight.elem_type, weight.shape, values)
    return helper.make_node("Constant", [], [weight.name], value=tensor)


@dataclass
class _Functions:
    """Bodies that were met, each once, and constants by name that they may hold."""

    constants: Mapping[str, NodeProto]
    functions: list[FunctionProto] = field(default_factory=list)
    _known: dict[bytes, str] = field(default_factory=dict)
    _used: dict[str, int] = field(default_factory=dict)

    def name_of(self, wanted: str, function: FunctionProto) -> str:
        """The name of the function with this body: `wanted`, or with an ordinal behind it."""
        key = wanted.encode() + function.SerializeToString(deterministic=True)
        if key not in self._known:
            self._used[wanted] = self._used.get(wanted, 0) + 1
            ordinal = self._used[wanted]
            name = wanted if ordinal == 1 else f"{wanted}_{ordinal}"
            self._known[key] = name
            function.name, function.domain = name, DOMAIN
            self.functions.append(function)
        return self._known[key]


_Kind = Callable[[NodeProto], str]
"""What a node belongs to; "" for nothing."""
_Call = Callable[[Sequence[NodeProto]], tuple[str, str, Mapping[str, str]]]


def _folded(
    nodes: Sequence[NodeProto],
    outputs: Sequence[str],
    kind: _Kind,
    made: _Functions,
    call: _Call,
) -> list[NodeProto]:
    """Runs of nodes of one kind, if it is not "" and has no other run, as calls of functions."""
    runs = [(name, list(run)) for name, run in groupby(nodes, kind)]
    names = [name for name, _ in runs]
    readers = _Readers(runs, outputs)
    found: list[NodeProto] = []
    for place, (name, run) in enumerate(runs):
        if not name or len(run) < 2 or names.count(name) > 1:
            found += run
        else:
            found.append(_call(run, name, readers.outside(place), made, *call(run)))
    return found


class _Readers:
    """In which runs each value is read."""

    def __init__(
        self, runs: Sequence[tuple[str, Sequence[NodeProto]]], outputs: Sequence[str]
    ) -> None:
        self._runs = runs
        self._places: dict[str, set[int]] = {value: {-1} for value in outputs}
        for place, (_, run) in enumerate(runs):
            for node in run:
                for value in names_read(node):
                    self._places.setdefault(value, set()).add(place)

    def outside(self, place: int) -> list[str]:
        """What a run makes and others read, in order."""
        made = [value for node in self._runs[place][1] for value in node.output if value]
        return [value for value in made if self._places.get(value, set()) - {place}]


def _call(
    run: Sequence[NodeProto],
    prefix: str,
    outputs: Sequence[str],
    made: _Functions,
    wanted: str,
    name: str,
    metadata: Mapping[str, str],
) -> NodeProto:
    """A call in place of the run, and its function, unless there is one with this body."""
    read = dict.fromkeys(value for node in run for value in names_read(node))
    run = [*(made.constants[value] for value in read if value in made.constants), *run]
    own = {value for node in run for value in node.output}
    local = {value for node in run for graph in _subgraphs(node) for value in _made_in(graph)}
    inputs = list(
        dict.fromkeys(
            v for n in run for v in names_read(n) if v and v not in own and v not in local
        )
    )
    inside: dict[str, str] = {}
    taken: set[str] = set()
    for number, value in enumerate(inputs):
        inside[value] = _free(_within(value, prefix) or f"input_{number}", taken)
    for value in (v for n in run for v in n.output if v):
        inside[value] = _free(_within(value, prefix) or "output", taken)
    body = [_renamed(node, inside, prefix) for node in run]
    function = FunctionProto()
    function.input.extend(inside[value] for value in inputs)
    function.output.extend(inside[value] for value in outputs)
    function.node.extend(body)
    op_type = made.name_of(wanted, function)
    node = helper.make_node(op_type, inputs, outputs, name=name, domain=DOMAIN)
    for key, text in metadata.items():
        node.metadata_props.add(key=key, value=text)
    return node


def _within(value: str, prefix: str) -> str:
    """What is left of a name behind the prefix; "" if it does not begin so."""
    return value[len(prefix) :].lstrip(".:") if value.startswith(prefix) else ""


def _free(name: str, taken: set[str]) -> str:
    found, ordinal = name, 1
    while found in taken:
        found, ordinal = f"{name}#{ordinal}", ordinal + 1
    taken.add(found)
    return found


def _renamed(node: NodeProto, names: Mapping[str, str], prefix: str) -> NodeProto:
    """A copy that reads and makes values by other names, in its subgraphs too; what it says of
    itself begins behind the prefix."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for values in (copy.input, copy.output):
        values[:] = [names.get(value, value) for value in values]
    copy.name = copy.output[0]
    for entry in copy.metadata_props:
        if entry.key in _OF_THE_WHOLE and entry.value.startswith(prefix):
            entry.value = _within(entry.value, prefix)
    for graph in _subgraphs(copy):
        local = set(_made_in(graph))
        inner = {old: new for old, new in names.items() if old not in local}
        renamed = [_renamed(one, inner, prefix) for one in graph.node]
        del graph.node[:]
        graph.node.extend(renamed)
    return copy


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g


def _made_in(graph: GraphProto) -> Iterator[str]:
    """Names that a subgraph gives to values of its own, and those that lie in it."""
    yield from (value.name for value in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield from node.output
        for inner in _subgraphs(node):
            yield from _made_in(inner)


def _said(node: NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _op_of(node: NodeProto) -> str:
    said = _said(node)
    return said.get("panguq.label", "") if "panguq.op" in said else ""


def _call_of_op(run: Sequence[NodeProto]) -> tuple[str, str, Mapping[str, str]]:
    said = _said(run[0])
    name = said["panguq.op"].split(".")[1]
    title = _NAMES.get(name, re.sub(r"\W", "_", name))
    for node in run:  # the call says it
        del node.metadata_props[:]
    if said.get("panguq.scheme"):
        title = f"QuantizedLinear_{re.sub(r'[^0-9A-Za-z]', '_', said['panguq.scheme'])}"
    return title, said["panguq.label"], said


def _layer_of(node: NodeProto) -> str:
    said = _said(node)
    found = _LAYER.match(said.get("panguq.module") or said.get("panguq.label", ""))
    return found[1] if found else ""


def _call_of_layer(run: Sequence[NodeProto]) -> tuple[str, str, Mapping[str, str]]:
    layer = _layer_of(run[0])
    return "Layer", layer, {"panguq.label": layer, "panguq.module": layer}
