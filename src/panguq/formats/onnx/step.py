"""One fx node on its way into an ONNX graph: what its emitter reads, and the nodes it adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import NodeProto, TensorProto
from torch import Tensor, fx

from panguq.errors import ExportError
from panguq.formats.onnx.builder import Builder, Value
from panguq.formats.onnx.types import NARROW, carried, carried_type, stored_type
from panguq.ir.call_arguments import argument, arguments
from panguq.ir.edit import label, module_path
from panguq.ir.ops.opset import name_of
from panguq.ir.views import Item

_TURNING = (
    "aten.linear.default", "panguq_cpu.dequantized_linear.default",
    "panguq_cpu.int8_linear.default", "panguq_cpu.weight_row_sums.default",
    "panguq.latent_attention.default", "panguq_npu.latent_attention.default",
)  # fmt: skip
"""Ops whose emitters read a matrix by `Step.turned`, or not at all."""


@dataclass
class Step:
    """What an emitter is given. It returns the name of the node's value, or a tuple of names.

    Steps on the way to the result are called `<label>.<suffix>`; the result has the label's name.
    """

    builder: Builder
    node: fx.Node
    extra: Mapping[str, str] = field(default_factory=dict)

    # --- what it reads --------------------------------------------------------------------------

    @property
    def label(self) -> str:
        return label(self.node)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the node's (first) result."""
        value = self.node.meta["val"]
        return (value[0] if isinstance(value, list | tuple) else value).dtype

    @property
    def elem_type(self) -> int:
        """ONNX's number of the type in which the result is carried."""
        return carried_type(self.dtype, self.label)

    def arguments(self) -> dict[str, Any]:
        """The call's arguments by the names of the op's schema, defaults included."""
        return arguments(self.node)

    def argument(self, position: int) -> Any:
        """The argument at this position."""
        return argument(self.node, position)

    def pair(self) -> tuple[Any, Any]:
        """The first two arguments."""
        return argument(self.node, 0), argument(self.node, 1)

    def read(self, argument: Any, dtype: torch.dtype | None = None, hint: str = "") -> str:
        """The value of an argument, a node or a number, as `dtype` (None: as it is)."""
        if not isinstance(argument, fx.Node):
            return self.number(argument, dtype or _natural(argument), hint)
        name = self.builder.value(argument)
        if not isinstance(name, str):
            raise self.error(f"reads all results of {label(argument)} at once")
        if dtype is None:
            return name
        wanted = carried_type(dtype, self.label)
        if self.builder.elem_type(name) == wanted:
            return name
        return self.add("Cast", name, suffix=f"{hint or label(argument)}.cast", to=wanted)

    def tensor(self, argument: Any) -> Tensor | None:
        """The values of an argument that depends only on stored weights; None for others."""
        if not isinstance(argument, fx.Node) or argument not in self.builder.constants:
            return None
        return self.builder.constants[argument]()

    def known(self, argument: Any) -> Tensor:
        """`tensor`, where the emitter needs it. Raises ExportError for a computed value."""
        found = self.tensor(argument)
        if found is None:
            raise self.error(f"its argument {argument} is computed, and only a stored one is known")
        return found

    def turned(self, weight: fx.Node, dtype: torch.dtype | None = None) -> str:
        """A matrix `[n, k]` as `[k, n]`, which ONNX's matmuls read; as `dtype`, as in `read`.

        Where matmuls alone read a stored one, the file holds it so, and nothing turns it at every
        call.
        """
        narrow = weight.meta["val"].dtype in NARROW
        others = [user for user in weight.users if name_of(user.target) not in _TURNING]
        if weight in self.builder.constants and not narrow and not others:
            return self.builder.stored(weight, turned=True)
        stored = self.read(weight, dtype)
        return self.add("Transpose", stored, suffix="weight_t", perm=[1, 0])

    def lazy(self, argument: fx.Node) -> Callable[[], Tensor]:
        """A function that gives the values of a stored argument, called when they are written."""
        if argument not in self.builder.constants:
            raise self.error(f"its argument {label(argument)} is computed, not stored")
        return self.builder.constants[argument]

    def rank(self, argument: Any) -> int:
        """The number of dimensions of an argument."""
        return argument.meta["val"].dim() if isinstance(argument, fx.Node) else 0

    # --- what it adds ---------------------------------------------------------------------------

    def number(self, value: Any, dtype: torch.dtype, hint: str = "") -> str:
        """A scalar as an initializer."""
        tensor = torch.tensor(value, dtype=carried(dtype))
        return self.builder.add_tensor(f"{self.label}.{hint or 'constant'}", tensor)

    def integers(self, values: Sequence[Any], hint: str) -> str:
        """int64 `[r]` of sizes, which are numbers or nodes."""
        if all(isinstance(value, int) for value in values):
            tensor = torch.tensor(list(values), dtype=torch.int64)
            return self.builder.add_tensor(f"{self.label}.{hint}", tensor)
        axis = self.builder.add_tensor(f"{self.label}.{hint}_axis", torch.tensor([0]))
        parts = []
        for index, value in enumerate(values):
            if isinstance(value, fx.Node):
                part = self.read(value, torch.int64)
                parts.append(self.add("Unsqueeze", part, axis, suffix=f"{hint}_{index}"))
            else:
                parts.append(self.integers([value], f"{hint}_{index}"))
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, suffix=hint, axis=0)

    def add(
        self, op_type: str, *inputs: str, suffix: str, domain: str = "", **attributes: Any
    ) -> str:
        """A node on the way; returns the name of its value."""
        name = self.builder.unique(f"{self.label}.{suffix}")
        self._node(op_type, inputs, [name], domain, attributes)
        if op_type == "Cast":
            self.builder.types[name] = (attributes["to"], None)
        return name

    def finish(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """The node whose value is the result, rounded to the result's dtype if that is narrow."""
        if self.dtype not in NARROW:
            return self.result(op_type, *inputs, domain=domain, **attributes)
        wide = self.add(op_type, *inputs, suffix="wide", domain=domain, **attributes)
        narrow = self.add("Cast", wide, suffix="rounded", to=stored_type(self.dtype, self.label))
        return self.result("Cast", narrow, to=TensorProto.FLOAT)

    def result(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """The node whose value is the result as it is: one that moves values, or counts."""
        name = self.builder.unique(self.label)
        self._node(op_type, inputs, [name], domain, attributes)
        self.builder.set_type(name, self.node, self.node.meta["val"])
        return name

    def results(self, op_type: str, *inputs: str, count: int, **attributes: Any) -> Value:
        """A node with several results, each called like the node that takes it out."""
        names = [self.result_name(index) for index in range(count)]
        return self.several(op_type, *inputs, results=names, **attributes)

    def several(self, op_type: str, *inputs: str, results: list[str], **attributes: Any) -> Value:
        """A node with several results, whose names `unique` has given out."""
        self._node(op_type, inputs, results, "", attributes)
        return tuple(results)

    @contextmanager
    def subgraph(self) -> Iterator[list[NodeProto]]:
        """What is added meanwhile becomes the nodes of a subgraph, which the list holds.

        Nothing may be read there for the first time that others read: it would belong to the
        subgraph. Stored tensors may, and numbers.
        """
        outer, self.builder.nodes = self.builder.nodes, []
        try:
            yield self.builder.nodes
        finally:
            self.builder.nodes = outer

    def result_name(self, index: int) -> str:
        """A name for result `index` of a node with several."""
        items = (Item.match(user) for user in self.node.users)
        takers = [item.node for item in items if item is not None and item.index == index]
        name = self.builder.unique(label(takers[0]) if takers else f"{self.label}[{index}]")
        self.builder.set_type(name, self.node, self.node.meta["val"][index])
        return name

    def call_it(self, name: str, wanted: str) -> str:
        """Give a value the name `wanted`, which `unique` has given out."""
        self._node("Identity", [name], [wanted], "", {})
        return wanted

    def split(self, name: str, parts: list[str], axis: int) -> None:
        """Cut a value into equal parts, whose names `unique` has given out."""
        self.several("Split", name, results=parts, axis=axis, num_outputs=len(parts))

    def round_to(self, name: str, dtype: torch.dtype, suffix: str) -> str:
        """A float32 value rounded to `dtype` and back."""
        if dtype not in NARROW:
            return name
        narrow = self.add("Cast", name, suffix=f"{suffix}.rounded", to=stored_type(dtype, name))
        return self.add("Cast", narrow, suffix=suffix, to=TensorProto.FLOAT)

    def error(self, message: str, hint: str = "") -> ExportError:
        """An error that names this node and its op."""
        op = name_of(self.node.target) or self.node.target
        return ExportError(f"node {self.label} ({op}): {message}", hint)

    def _node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: list[str],
        domain: str,
        attributes: Mapping[str, Any],
    ) -> None:
        metadata = {"panguq.label": self.label, "panguq.op": str(name_of(self.node.target))}
        if module_path(self.node):
            metadata["panguq.module"] = module_path(self.node)
        metadata.update(self.extra)
        given = {key: value for key, value in attributes.items() if value is not None}
        self.builder.add_node(op_type, inputs, outputs, domain, metadata, given)


def _natural(value: Any) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float32


Emitter = Callable[[Step], Value | None]
"""Adds a node's ONNX nodes and returns its value; None for a node that yields nothing."""
