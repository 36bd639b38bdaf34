"""What all traces share: a module exported, and the plain graph of what was exported.

`torch.export` (non-strict) runs the module on fake tensors, so a trace costs no weights. Every
size is at least 2 while tracing, because export bakes in the sizes 0 and 1; the graph itself
then serves those too. The exported graph is rewritten so that its inputs are only the user's
and weights are read by `get_attr` under the names they have in the source model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.export import ExportedProgram, default_decompositions
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from panguq.errors import TraceError, first_line
from panguq.ir.expert_loops import loop_error, looped_experts, refuse_loops
from panguq.ir.exported_graph import (
    WHAT_TO_DO,
    Stacks,
    check_deterministic,
    returned_by,
    unlift,
    writes_dropped,
)
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.ir.ops import experts as expert_ops  # noqa: F401
from panguq.ir.ops import linear_attention  # noqa: F401
from panguq.ir.ops.opset import is_allowed


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares all tensors, to be changed freely for tracing."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors}).eval()


def fake_mode_of(model: nn.Module) -> FakeTensorMode | None:
    """The mode of the model's tensors if they are fake, or None."""
    for tensor in [*model.parameters(), *model.buffers()]:
        mode = getattr(tensor, "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    return None


_PICKS_BY_VALUE = (DynamicOutputShapeException, GuardOnDataDependentSymNode)
_WHAT_IS_SERVED = (
    "panguq traces decoder-only transformers models, and any module given with example inputs"
)


def export(
    module: nn.Module, args: tuple[Any, ...], dynamic: Any, source: nn.Module
) -> ExportedProgram:
    """Export a module; `source` is the one to blame."""
    # Nearly every call in a trace has sizes of its own: torch would fill a cache that none reads.
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with naming_the_module(source), torch.no_grad(), uncached:
        exported = torch.export.export(module, args, dynamic_shapes=dynamic, strict=False)
        nodes = list(exported.graph_module.graph.nodes)
        refuse_loops(nodes, source)
        if any(_writes(node) for node in nodes):
            exported = exported.run_decompositions({})  # writes in place become values
        if any(_is_unknown(node) for node in exported.graph_module.graph.nodes):
            exported = exported.run_decompositions(_decompositions())
        return exported


@contextmanager
def naming_the_module(source: nn.Module) -> Iterator[None]:
    """What goes wrong within is a TraceError that names the module at fault."""
    try:
        yield
    except TraceError:
        raise
    except Exception as error:
        sizes = re.match(r"Constraints violated \((.*?)\)", str(error))
        if sizes:
            raise TraceError(
                f"cannot trace {type(source).__name__}: its forward branches on these sizes or "
                f"limits them: {sizes[1]}",
                f"one graph serves every size. {_WHAT_IS_SERVED}; {WHAT_TO_DO}",
            ) from error
        path = _innermost_module(error, source)
        module = source.get_submodule(path)
        if isinstance(error, _PICKS_BY_VALUE) and looped_experts(module):
            raise loop_error(path, module) from error
        place = f"module {path} ({type(module).__name__})" if path else type(source).__name__
        raise TraceError(
            f"cannot trace {place}: {first_line(error, typed=True)}",
            "the forward may depend on tensor values or fix a size; make it shape-polymorphic, "
            f"or compile the part of the model that is. {_WHAT_IS_SERVED}; {WHAT_TO_DO}",
        ) from error


def plain_graph(
    exported: ExportedProgram, model: nn.Module, strip: str, stacks: Stacks
) -> fx.GraphModule:
    """The plain graph; what it leaves undone is told in `gm.meta["trace_warnings"]`."""
    name = type(model).__name__
    check_deterministic(exported, name)
    results = returned_by(exported, name)
    gm = unlift(exported, results, strip, stacks)
    gm.meta["trace_warnings"] = tuple(f"{name}: {w}" for w in writes_dropped(exported, results))
    return gm


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_unknown(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not is_allowed(node.target)


def _decompositions() -> dict[Any, Any]:
    """How ops that no graph may contain are said in others; those that it may stay as they are."""
    known = {op: say for op, say in default_decompositions().items() if not is_allowed(op)}
    return {**known, torch.ops.aten.copy.default: _copied}


def _copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What a write of `source` into all of `x` leaves there."""
    return source.to(x.dtype).expand(x.shape)


def _innermost_module(error: BaseException, root: nn.Module) -> str:
    """The path of the deepest submodule on the traceback, found by its `self`; empty for none."""
    paths = {id(m): name for name, m in root.named_modules()}
    found = ""
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            found = paths[id(owner)]
        frame = frame.tb_next
    return found
