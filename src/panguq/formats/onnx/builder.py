"""An ONNX graph being written: its nodes, its weights, and which value belongs to which fx node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, fx

from panguq.formats.onnx.types import (
    NARROW,
    OnnxShape,
    carried_type,
    nbytes,
    onnx_shape,
    stored_type,
)
from panguq.ir.edit import label

OPSET = 24  # Swish is the newest op used; onnxruntime 1.31 runs no later Swish than this one's
MICROSOFT = "com.microsoft"

Value = str | tuple[Any, ...]
"""The name of a tensor, or one for each result of a node with several."""


@dataclass(frozen=True)
class Weight:
    """An initializer whose bytes are made when they are written.

    `make` gives a tensor with exactly these bytes, row by row (int4: uint8, the low half first).
    """

    name: str
    elem_type: int
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return nbytes(self.elem_type, self.shape)


@dataclass
class Builder:
    """Collects nodes in order. Names of values are unique; `values` maps fx nodes to them."""

    gm: fx.GraphModule
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    types: dict[str, tuple[int, OnnxShape | None]] = field(default_factory=dict)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    constants: dict[fx.Node, Callable[[], Tensor]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    producers: dict[str, NodeProto] = field(default_factory=dict)

    def unique(self, name: str) -> str:
        """`name`, with an ordinal if a value is called so already."""
        found, ordinal = name, 1
        while found in self.taken:
            found, ordinal = f"{name}#{ordinal}", ordinal + 1
        self.taken.add(found)
        return found

    def add_node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str,
        metadata: Mapping[str, str],
        attributes: Mapping[str, Any],
    ) -> None:
        """Append a node; it is called like its first result."""
        node = helper.make_node(
            op_type, inputs, outputs, name=outputs[0], domain=domain, **attributes
        )
        for key, value in metadata.items():
            node.metadata_props.add(key=key, value=value)
        self.nodes.append(node)
        self.producers.update(dict.fromkeys(outputs, node))

    def add_weight(
        self, name: str, elem_type: int, shape: Sequence[int], make: Callable[[], Tensor]
    ) -> str:
        """An initializer under a free name like `name`; returns that name."""
        name = self.unique(name)
        self.weights[name] = Weight(name, elem_type, tuple(shape), make)
        self.types[name] = (elem_type, tuple(shape))
        return name

    def add_tensor(self, name: str, tensor: Tensor) -> str:
        """An initializer with these values."""
        kept = tensor.detach().contiguous()
        return self.add_weight(name, stored_type(kept.dtype, name), kept.shape, lambda: kept)

    def elem_type(self, name: str) -> int | None:
        """The type of a value, where it is known."""
        return self.types[name][0] if name in self.types else None

    def set_type(self, name: str, node: fx.Node, value: Any) -> None:
        """Record that the value `name` is what `node` yields."""
        if isinstance(value, Tensor):
            shape = onnx_shape(value, self.gm.meta.get("symbol_names", {}))
            self.types[name] = (carried_type(value.dtype, label(node)), shape)
        elif isinstance(value, torch.SymInt | int):
            self.types[name] = (TensorProto.INT64, ())

    def value(self, node: fx.Node) -> Value:
        """The name of what `node` yields; a stored tensor becomes an initializer when first read.

        A 16-bit one is widened, once, by a Cast called `<label>.float32`.
        """
        if node not in self.values:
            stored = self.stored(node)
            if node.meta["val"].dtype in NARROW:
                wide = self.unique(f"{label(node)}.float32")
                attributes = {"to": TensorProto.FLOAT}
                self.add_node("Cast", [stored], [wide], "", {"panguq.label": wide}, attributes)
                self.set_type(wide, node, node.meta["val"])
                stored = wide
            self.values[node] = stored
        return self.values[node]

    def stored(self, node: fx.Node, turned: bool = False) -> str:
        """The initializer that holds a constant node's tensor, in the tensor's own dtype; `turned`,
        the transpose of a matrix, called `<label>_t`."""
        name = self._stored.get((node, turned))
        if name is None:
            make = self.constants[node]
            shape = [int(size) for size in node.meta["val"].shape]
            elem_type = stored_type(node.meta["val"].dtype, label(node))
            if turned:
                name = self.add_weight(
                    f"{label(node)}_t", elem_type, shape[::-1], lambda: make().t()
                )
            else:
                name = self.add_weight(label(node), elem_type, shape, make)
            self._stored[node, turned] = name
        return name

    _stored: dict[tuple[fx.Node, bool], str] = field(default_factory=dict)

    def prune(self, outputs: Sequence[str]) -> None:
        """Drop nodes and weights that no output depends on."""
        needed = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(names_read(node))
                kept.append(node)
        self.nodes = kept[::-1]
        self.weights = {name: w for name, w in self.weights.items() if name in needed}


def names_read(node: NodeProto) -> Iterator[str]:
    """What a node reads, and what its subgraphs read; the latter's own values are among it."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from names_read(inner)
