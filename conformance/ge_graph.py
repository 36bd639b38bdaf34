"""torchair, the converter inside torch_npu, from an fx graph to Ascend's GE graph, as text.

The converters run as they are. Three things around them need CANN and are put aside: starting the
graph engine, asking it which operators this CANN knows, and writing the model file.
"""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from conformance.calls import SYMBOL_HINT, Answer, Call, quiet


class NotConverted(RuntimeError):
    """torchair has no converter for an op of the graph."""


@contextlib.contextmanager
def _without_cann() -> Iterator[dict[str, bytes]]:
    """torchair that neither starts nor asks a graph engine; yields what it would have written."""
    import torchair
    from torchair._ge_concrete_graph import compat_ir, fx2ge_converter
    from torchair.core import _torchair

    written: dict[str, bytes] = {}
    aside = [
        (fx2ge_converter, "initialize_graph_engine", lambda *_, **__: None),
        (compat_ir, "is_cann_compat", lambda *_, **__: ""),
        (_torchair, "export", lambda model, _: written.update(model=model)),
        # Where no converter is written, torchair asks CANN for an operator of that name, and some
        # kinds of op get a placeholder.
        (fx2ge_converter, "_generate_converter_code", _no_converter),
        (fx2ge_converter.GeConcreteGraph, "_create_mock_node_for_op", _no_placeholder),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in aside]
    assert torchair is not None
    for owner, name, replacement in aside:
        setattr(owner, name, replacement)
    try:
        yield written
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


def _no_converter(target: object) -> None:
    raise NotConverted(f"torchair has no converter for {target}")


def _no_placeholder(_: object, target: object, *__: object) -> None:
    _no_converter(target)


class Plain(nn.Module):
    """A graph module in a module of its own: fx's error handling would hide how an export ends."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        """The module's results."""
        return self.module(*inputs)


def convert(module: nn.Module, inputs: Sequence[Tensor], dynamic: bool = False) -> list[Any]:
    """The GE operators (`OpDef` messages) of a module called with these inputs."""
    import torchair
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    with _without_cann() as written, tempfile.TemporaryDirectory() as folder, quiet():
        torchair.dynamo_export(
            *inputs, model=Plain(module), export_path=folder, export_name="graph", dynamic=dynamic
        )
    model = ModelDef()
    model.ParseFromString(written["model"])
    return list(model.graph[0].op)


class _OneCall(nn.Module):
    """A module that makes one call; tensors are inputs, all else is part of it."""

    def __init__(self, called: Call) -> None:
        super().__init__()
        self.called = called
        leaves, self.form = pytree.tree_flatten(called.with_tensors("cpu", SYMBOL_HINT))
        self.leaves = leaves
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        """The call with these tensors in their places."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return getattr(torch.ops.npu, self.called.op).default(*args, **kwargs)


def ask_torchair(called: Call) -> tuple[Answer, list[str]]:
    """Whether the converter takes a call, and the operators that it becomes."""
    module = _OneCall(called)
    try:
        operators = convert(module, module.tensors)
    except Exception as error:  # dynamo wraps whatever a converter raises
        return Answer(_cause(error)), []
    return Answer(None), [line for line in map(operator_text, operators) if line is not None]


def _cause(error: BaseException) -> str:
    while inner := getattr(error, "inner_exception", None) or error.__cause__:
        error = inner
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def operator_text(operator: Any) -> str | None:
    """`QuantBatchMatmulV3(x1 INT8, x2 INT8, ...) dtype=27 -> y BF16`; None for data and ends."""
    if operator.type in ("Data", "RefData", "Const", "NetOutput"):
        return None
    inputs = [
        f"{desc.name} {_dtype(desc)}"
        for name, desc in zip(operator.input, operator.input_desc, strict=False)
        if name
    ]
    attributes = [
        f"{name}={_attribute(value)}"
        for name, value in sorted(operator.attr.items())
        if not name.startswith("_")
    ]
    outputs = [f"{desc.name} {_dtype(desc)}" for desc in operator.output_desc]
    text = f"{operator.type}({', '.join(inputs)}) {' '.join(attributes)}".rstrip()
    # The registrations that torchair ships are out of date for ordinary operators.
    outside = outside_contract(operator) if "Quant" in operator.type else []
    note = f"   # not in the operator's list: {', '.join(outside)}" if outside else ""
    return f"{text} -> {', '.join(outputs)}{note}"


def _dtype(desc: Any) -> str:
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType

    # A converter's own intermediate values carry no type until GE infers one; FLOAT is the default.
    if "_meta" not in desc.attr and desc.dtype == DataType.DT_FLOAT:
        return "?"
    name: str = DataType.Name(desc.dtype)
    return name.removeprefix("DT_")


def _attribute(value: Any) -> str:
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType

    kind = value.WhichOneof("value")
    if kind == "s":
        return repr(value.s.decode())
    if kind == "list":
        return str([*value.list.i, *value.list.f, *value.list.b])
    if kind == "dt":
        return str(DataType.Name(value.dt)).removeprefix("DT_")
    if kind == "f":
        return f"{value.f:.9g}"
    return str(getattr(value, kind)) if kind in ("i", "b") else f"<{kind}>"


def summary(operators: Sequence[Any]) -> str:
    """Each different operator of a graph once, with how many there are, sorted."""
    counts = Counter(line for line in map(operator_text, operators) if line is not None)
    return "".join(f"{count:4} x {line}\n" for line, count in sorted(counts.items()))


def outside_contract(operator: Any) -> list[str]:
    """Inputs whose dtype is not among those that the operator's own registration lists."""
    allowed = _registered_dtypes(operator.type)
    return [
        f"{desc.name} {_dtype(desc)}"
        for name, desc in zip(operator.input, operator.input_desc, strict=False)
        if name and desc.name in allowed and _dtype(desc) not in {*allowed[desc.name], "?"}
    ]


# The spellings that registrations use beside those of the GE graph.
SAME = {"BFLOAT16": "BF16"}


@functools.cache
def _registered_dtypes(operator_type: str) -> dict[str, frozenset[str]]:
    """For each input the dtypes in REG_OP, which torchair keeps as the constructor's docstring."""
    from torchair._ge_concrete_graph import auto_generated_ge_raw_ops as constructors

    text = getattr(getattr(constructors, operator_type, None), "__doc__", None) or ""
    found = re.findall(r"INPUT\((\w+), TensorType\(\{(.*?)\}\)\)", text)
    return {
        name: frozenset(SAME.get(word, word) for word in re.findall(r"DT_(\w+)", dtypes))
        for name, dtypes in found
    }
