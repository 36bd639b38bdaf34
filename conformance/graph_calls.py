"""The npu calls of a lowered graph, asked of the real Meta kernels with symbolic sizes, and as
plain calls with known sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

from conformance.calls import Call, TensorType, quiet
from panguq.ir.edit import label


@dataclass(frozen=True)
class NodeCall:
    """A call with known sizes, where it stands, and the types that the graph gives its results."""

    label: str
    call: Call
    results: tuple[str, ...]


def npu_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that call torch_npu's ops."""
    return [node for node in gm.graph.nodes if namespace_of(node) == "npu"]


def namespace_of(node: fx.Node) -> str:
    """`npu`, `aten`, `panguq_npu` …; empty for what is no call of an op."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target.namespace


def disagreement(node: fx.Node) -> str | None:
    """Asks the Meta kernel with the node's own symbolic argument types on device npu.

    What it says against the node's own type, or what it adds to the graph's guards; None if it
    agrees.
    """
    shape_env = _shape_env(node)
    guards = len(shape_env.guards) if shape_env is not None else 0
    assert isinstance(node.target, torch._ops.OpOverload)
    try:
        with quiet(), FakeTensorMode(shape_env=shape_env):
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: _on_npu(n.meta["val"]))
            results = node.target(*arguments[0], **arguments[1])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"{label(node)}: {node.target}: {str(error).strip().splitlines()[0]}"
    for expected, found in zip(_tensors(node.meta["val"]), _tensors(results), strict=True):
        if expected.dtype != found.dtype or not _same(expected.shape, found.shape):
            return (
                f"{label(node)}: {node.target}: the graph says {expected.dtype} "
                f"{list(expected.shape)}, torch_npu says {found.dtype} {list(found.shape)}"
            )
    if shape_env is not None and len(shape_env.guards) > guards:
        return f"{label(node)}: {node.target} adds the guard {shape_env.guards[-1].expr}"
    return None


def _shape_env(node: fx.Node) -> ShapeEnv | None:
    values = [node.meta["val"], *(n.meta["val"] for n in node.all_input_nodes)]
    tensors = [tensor for value in values for tensor in _tensors(value)]
    modes = [tensor.fake_mode for tensor in tensors if hasattr(tensor, "fake_mode")]
    return next((mode.shape_env for mode in modes if mode.shape_env is not None), None)


def _on_npu(value: Any) -> Any:
    """The same types on device npu, in the fake tensor mode that is active."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="npu")
    if isinstance(value, (list, tuple)):
        return type(value)(_on_npu(item) for item in value)
    return value


def _tensors(value: Any) -> list[Any]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, Tensor)]


def _same(left: torch.Size, right: torch.Size) -> bool:
    return len(left) == len(right) and all(
        statically_known_true(a == b) for a, b in zip(left, right, strict=True)
    )


def node_calls(gm: fx.GraphModule, sizes: Mapping[str, int]) -> Iterator[NodeCall]:
    """Each different npu call once, with the named sizes (`batch`, `seq`, …) put in."""
    seen: set[str] = set()
    known = _Known({s: sizes[name] for s, name in gm.meta["symbol_names"].items()})
    for node in npu_nodes(gm):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known.value(n.meta["val"]))
        assert isinstance(node.target, torch._ops.OpOverload)
        call = Call(node.target._schema.name.partition("::")[2], args, kwargs)
        if str(call) not in seen:
            seen.add(str(call))
            results = tuple(known.text(tensor) for tensor in _tensors(node.meta["val"]))
            # Where panguq's own kernel was chosen is no matter of these checks.
            yield NodeCall(label(node).removesuffix(".vendor"), call, results)


@dataclass(frozen=True)
class _Known:
    """Sizes of symbols."""

    sizes: Mapping[Any, int]

    def size(self, size: int | torch.SymInt) -> int:
        if not isinstance(size, torch.SymInt):
            return size
        return int(size.node.expr.subs(self.sizes))

    def value(self, value: Any) -> Any:
        """A node's type as an argument of a Call."""
        if isinstance(value, Tensor):
            sizes = tuple(self.size(size) for size in value.shape)
            strides = tuple(self.size(stride) for stride in value.stride())
            plain = torch.empty(sizes, device="meta").stride() == strides
            return TensorType(value.dtype, sizes, None if plain else strides)
        if isinstance(value, torch.SymInt):
            return self.size(value)
        return value

    def text(self, tensor: Tensor) -> str:
        """`bfloat16[34, 768]`."""
        return str(TensorType(tensor.dtype, tuple(self.size(size) for size in tensor.shape)))
