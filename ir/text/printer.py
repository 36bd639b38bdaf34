"""A graph as text: one line a node, weights by shape, largest magnitude and a short hash."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.edit import get_tensor, label, op_name
from panguq.ir.exported_graph import shape_of
from panguq.ir.node_meta import meta_of

_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def content_hash(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes, in hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Hasher:
    """Content hashes, computed once for each tensor object."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, str]] = {}

    def __call__(self, tensor: Tensor) -> str:
        """The content hash of `tensor`."""
        if id(tensor) not in self._known:
            self._known[id(tensor)] = (tensor, content_hash(tensor))
        return self._known[id(tensor)][1]


def print_graph(gm: fx.GraphModule, hasher: Hasher | None = None) -> str:
    """The graph as text; with a hasher, weights also show amax and a short content hash."""
    return "\n".join(_line(gm, node, hasher) for node in gm.graph.nodes) + "\n"


def _line(gm: fx.GraphModule, node: fx.Node, hasher: Hasher | None) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    kind = _type(gm, node)
    if node.op == "placeholder":
        return f"%{label(node)} : {kind} = input"
    if node.op == "get_attr":
        return f"%{label(node)} : {kind} = weight{_content(gm, node, hasher)}"
    known = hasattr(node.target, "_schema")
    op = str(node.target).removesuffix(".default") if known else op_name(node)
    arguments = [_argument(a) for a in node.args]
    arguments += [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    scheme = meta_of(node).scheme
    noted = "" if scheme is None else f"  # {scheme.name}"
    return f"%{label(node)} : {kind} = {op}({', '.join(arguments)}){noted}"


def _content(gm: fx.GraphModule, node: fx.Node, hasher: Hasher | None) -> str:
    if hasher is None:
        return ""
    tensor = get_tensor(gm, str(node.target))
    has_no_max = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    plain = tensor.float() if has_no_max else tensor
    amax = float(plain.abs().max()) if tensor.numel() else 0.0
    return f" amax={amax:.6g} #{hasher(tensor)[:10]}"


def _type(gm: fx.GraphModule, node: fx.Node) -> str:
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        sizes = ", ".join(str(s) for s in shape_of(gm, node))
        return f"{_DTYPES.get(val.dtype, str(val.dtype).removeprefix('torch.'))}[{sizes}]"
    if isinstance(val, (tuple, list)):
        return "tuple"
    return "size"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{label(value)}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_argument(v) for v in value)}]"
    if isinstance(value, float):
        return repr(value)
    return str(value)
