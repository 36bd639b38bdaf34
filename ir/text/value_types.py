"""Value types as text, `float32[batch, past + seq, 576]`, and their return to a loaded graph."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from panguq.errors import StorageError
from panguq.ir.edit import get_tensor, label, value_types
from panguq.ir.interface import Interface
from panguq.ir.node_meta import annotate, meta_of
from panguq.ir.text.size_expression import evaluate_size, names_in
from panguq.tensors.dtypes import dtype_name

DTYPES: dict[str, torch.dtype] = {
    dtype_name(dtype): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.complex128,
        torch.complex64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


Names = Mapping[sympy.Symbol, str]
"""What each symbol is called; a graph keeps its own as `gm.meta["symbol_names"]`."""


def spell_size(size: int | torch.SymInt, names: Names) -> str:
    """A size with its symbols under their names: `past + seq`."""
    if not isinstance(size, torch.SymInt):
        return str(int(size))
    expr = size.node.expr
    return str(expr.subs({s: sympy.Symbol(names[s]) for s in expr.free_symbols if s in names}))


def type_text(value: Any, names: Names) -> str:
    """A value's type: dtype and sizes of a tensor, all parts of a tuple, the formula of a size."""
    if isinstance(value, Tensor):
        sizes = ", ".join(spell_size(size, names) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(type_text(item, names) for item in value)})"
    if isinstance(value, torch.SymInt):
        return f"int {spell_size(value, names)}"
    return type(value).__name__


def restore_types(gm: fx.GraphModule, interface: Interface) -> None:
    """Give every node of a loaded graph its `meta["val"]` again, with symbolic sizes.

    Inputs have the shapes that `interface.input_shapes` spells, one symbol for each name; the
    rest follows by running the graph on fake tensors. Raises StorageError, naming the node, if
    that fails or gives another type than the saved graph had.
    """
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    sizes = _symbols(shape_env, interface)
    names = {size.node.expr: name for name, size in sizes.items()}
    gm.meta["symbol_names"] = names
    gm.meta["size_limits"] = interface.size_limits
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                value = _input(node, interface, sizes)
            elif node.op == "get_attr":
                value = mode.from_tensor(get_tensor(gm, str(node.target)), static_shapes=True)
            else:
                value = _result(node)
            node.meta["val"] = value
            stored, found = meta_of(node).stored_type, type_text(value, names)
            if stored is not None and found != stored:
                raise StorageError(
                    f"node {label(node)} yields {found}, but the saved graph says {stored}",
                    _DAMAGED,
                )
    for node in gm.graph.nodes:
        annotate(node, stored_type=None)


_DAMAGED = "the graph file was changed, or the installed torch infers other sizes; compile again"


def _primes() -> Iterator[int]:
    """3, 5, 7, 11 …: as example sizes, so that no two are equal or multiples by accident."""
    return (n for n in itertools.count(3, 2) if all(n % d for d in range(3, n, 2)))


def _symbols(shape_env: ShapeEnv, interface: Interface) -> dict[str, torch.SymInt]:
    texts = [str(size) for shape in interface.input_shapes.values() for size in shape]
    names = dict.fromkeys(name for text in texts for name in names_in(text))
    sizes: dict[str, Any] = {}
    primes = _primes()
    for name in names:
        least, largest = interface.size_limits.get(name, (0, None))
        hint = next(p for p in primes if p >= least)
        hint = hint if largest is None else min(hint, largest)
        source = ConstantSource(name)
        symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes[name] = shape_env.create_symintnode(symbol, hint=hint, source=source)
    return sizes


def _input(node: fx.Node, interface: Interface, sizes: dict[str, torch.SymInt]) -> Tensor:
    name = str(node.target)
    dtype = DTYPES.get(re.split(r"\[", meta_of(node).stored_type or "")[0])
    if name not in interface.input_shapes or dtype is None:
        what = "dtype in the graph" if dtype is None else "shape in the interface"
        raise StorageError(f"the graph's input {name} has no {what}", _DAMAGED)
    shape = [evaluate_size(str(size), sizes) for size in interface.input_shapes[name]]
    return torch.empty(shape, dtype=dtype)


def _result(node: fx.Node) -> Any:
    assert callable(node.target)
    try:
        return node.target(*value_types(node.args), **value_types(node.kwargs))
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise StorageError(
            f"node {label(node)} cannot take its arguments: {type(error).__name__}: {first_line}",
            _DAMAGED,
        ) from error
