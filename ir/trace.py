"""Any module as an fx graph of ATen ops, with dynamic sizes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from panguq.errors import TraceError
from panguq.ir.edit import finish
from panguq.ir.experts import choose_experts
from panguq.ir.export import export, plain_graph, skeleton_of
from panguq.ir.exported_graph import name_symbols
from panguq.ir.interface import Interface
from panguq.ir.probe_sizes import excluded
from panguq.tensors.dtypes import dtype_name


def trace_module(
    model: nn.Module,
    example_inputs: Sequence[Tensor],
    names: Sequence[str] = (),
) -> tuple[fx.GraphModule, Interface]:
    """Trace any module that maps tensors to a tensor or a tuple of tensors.

    Sizes of the example inputs stay dynamic wherever the module allows it; they must be at
    least 2. With `names` of the inputs, the module only wraps another one, its attribute `model`,
    whose name and whose weights' names count. Raises TraceError otherwise, or if the module cannot
    be exported.
    """
    source: Any = model.model if names else model
    for index, example in enumerate(example_inputs):
        if not isinstance(example, Tensor) or min(example.shape, default=2) < 2:
            raise TraceError(
                f"example input {names[index] if names else index} of "
                f"{type(source).__name__} is not a tensor with every "
                f"size at least 2: {getattr(example, 'shape', type(example).__name__)}",
                "sizes 0 and 1 would be baked into the graph; give a larger example",
            )
    dynamic: tuple[Any, ...] = tuple({d: Dim.AUTO for d in range(e.dim())} for e in example_inputs)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # `*inputs` is one argument to export
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        dynamic = (*dynamic[:named], dynamic[named:])
    exported, gm, input_shapes = _traced(model, tuple(example_inputs), dynamic, names)
    results = next(reversed(gm.graph.nodes)).args[0]
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    interface = Interface(
        kind="module",
        inputs=tuple(input_shapes),
        outputs=tuple(f"output_{i}" for i in range(len(results))),
        input_shapes=input_shapes,
        float_dtype=dtype_name(floats[0] if floats else torch.float32),
        returns="tensor" if exported.call_spec.out_spec.is_leaf() else "tuple",
        size_limits=gm.meta["size_limits"],
    )
    return gm, interface


def _traced(
    model: nn.Module, args: tuple[Tensor, ...], dynamic: Any, names: Sequence[str]
) -> tuple[ExportedProgram, fx.GraphModule, dict[str, tuple[str | int, ...]]]:
    """The exported module, its graph, and its inputs' shapes.

    A size that is dynamic to export and yet not free, such as one whose halves must fit a weight,
    is made static: only few calls could choose another one.
    """
    while True:
        copied: Any = skeleton_of(model)
        choose_experts(copied)
        exported = export(copied, args, dynamic, copied.model if names else copied)
        if names:
            gm = plain_graph(exported, copied.model, "model.", {})
            _name_inputs(gm, names)
        else:
            gm = plain_graph(exported, model, "", {})
        shapes = name_symbols(gm, _encoder_sizes(names) if names else None)
        gm.meta["size_limits"] = _size_limits(gm, exported)
        bound = excluded(gm)
        if not bound:
            return exported, gm, shapes
        given = [n.meta["val"].shape for n in gm.graph.nodes if n.op == "placeholder"]
        for axes, shape in zip(tree_leaves(dynamic, is_leaf=_is_axes), given, strict=True):
            for axis, size in enumerate(shape):
                if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & bound:
                    axes[axis] = Dim.STATIC


def _name_inputs(gm: fx.GraphModule, names: Sequence[str]) -> None:
    """Call the graph's inputs so."""
    given = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, name in zip(given, names, strict=True):
        node.target = name
        node._rename(name)
    finish(gm)


def _encoder_sizes(names: Sequence[str]) -> dict[tuple[str, int], str]:
    """What the first input's sizes are called; others have the input's name and the axis."""
    of_tokens = {(name, 1): "seq" for name in names if name == "input_ids"}
    return {(names[0], 0): "batch", **of_tokens}


def _is_axes(value: object) -> bool:
    return isinstance(value, dict)


def _size_limits(
    gm: fx.GraphModule, exported: ExportedProgram
) -> dict[str, tuple[int, int | None]]:
    """The range of every named size on which the trace's branches hold.

    Export assumes at least 2 of every dynamic size; a bound of 2 or less is that, no branch.
    """
    limits = {}
    for symbol, bounds in exported.range_constraints.items():
        name = gm.meta["symbol_names"].get(symbol)
        if name is not None:
            least = int(bounds.lower) if isinstance(bounds.lower, sympy.Integer) else 0
            largest = int(bounds.upper) if isinstance(bounds.upper, sympy.Integer) else None
            limits[name] = (least if least > 2 else 0, largest)
    return limits
