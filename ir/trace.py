"""A module as an fx graph of ATen ops, with dynamic sizes and the KV cache as plain tensors.

`torch.export` (non-strict) runs the module on fake tensors, so a trace costs no weights. Every
size is at least 2 while tracing, because export bakes in the sizes 0 and 1; the graph itself
then serves those too. The exported graph is rewritten so that its inputs are only the user's
and weights are read by `get_attr` under the names they have in the source model.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import sympy
import torch
import torch._dynamo.config
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, default_decompositions
from torch.utils._pytree import tree_leaves

from panguq.errors import TraceError, first_line
from panguq.ir.causal_lm import (
    CausalLMStep,
    MaskForm,
    cache_layers,
    check_keeps_a_cache,
    choose_attention,
)
from panguq.ir.causal_tables import compute_causal_tables
from panguq.ir.edit import finish, module_path
from panguq.ir.experts import check_experts, choose_experts
from panguq.ir.exported_graph import (
    WHAT_TO_DO,
    Stacks,
    check_deterministic,
    name_symbols,
    returned_by,
    unlift,
    writes_dropped,
)
from panguq.ir.interface import CachedTensor, Interface
from panguq.ir.length_limits import (
    LengthLimit,
    attends_both_ways,
    attention_windows,
    check_causal_modules,
    keep_rotary_frequencies,
    reset_rotary_frequencies,
)
from panguq.ir.ops.opset import is_allowed
from panguq.ir.probe_sizes import excluded
from panguq.ir.recurrences import recurrences_as_ops
from panguq.tensors.dtypes import dtype_name

BATCH, SEQ, PAST, KEPT = 3, 5, 7, 2  # all different, none of them 0 or 1


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


def is_causal_lm(model: Any) -> bool:
    """Whether this is a transformers model that continues token sequences from a cache.

    Attention that goes both ways continues nothing: the cache would hold what the next token
    changes.
    """
    generates = hasattr(model, "config") and hasattr(model, "generate") and model.can_generate()
    return generates and not attends_both_ways(model)


def encoder_decoder(model: Any) -> TraceError:
    """The error for a model of two halves."""
    return TraceError(
        f"{type(model).__name__} is an encoder-decoder model",
        "panguq compiles its encoder alone: panguq.compile(model.get_encoder(), ...)",
    )


def trace_causal_lm(
    model: nn.Module, mask_form: MaskForm = "attended"
) -> tuple[fx.GraphModule, Interface]:
    """Trace a transformers causal language model; its weights are shared, not copied.

    mask_form: how the model is told what to attend to. Raises TraceError, naming the module at
    fault, if the model cannot be exported.
    """
    skeleton: Any = skeleton_of(model)
    config = skeleton.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise encoder_decoder(model)
    check_keeps_a_cache(model)
    check_experts(skeleton)
    choose_experts(skeleton)
    windows, limits = attention_windows(model, config)
    limits += reset_rotary_frequencies(skeleton)
    keep_rotary_frequencies(skeleton)
    choose_attention(skeleton)
    compute_causal_tables(skeleton)
    step = CausalLMStep(skeleton, mask_form, windows)
    mode = fake_mode_of(model)
    asked = CausalLMStep(skeleton_of(skeleton), mask_form, windows)  # it keeps fake buffers
    with _naming_the_module(asked.model), recurrences_as_ops(asked.model):
        cached = cache_layers(asked, mode)
    dtype = next(skeleton.parameters()).dtype
    step.keep(cached, dtype_name(dtype))
    tensors = step.tensors
    with mode or nullcontext():
        positions = torch.arange(PAST, PAST + SEQ).expand(BATCH, SEQ)
        args = (
            torch.zeros(BATCH, SEQ, dtype=torch.long),
            torch.ones(BATCH, 1, SEQ, PAST + SEQ, dtype=torch.bool),
            positions,
            torch.arange(KEPT),
            [_zeros(len(places), tensors[places[0]]) for places in step.stacks],
        )
    batch, seq, kept, length = Dim("batch"), Dim("seq"), Dim("kept"), Dim("past")
    dynamic = (
        {0: batch, 1: seq},
        {0: batch, 2: seq, 3: Dim.AUTO},
        {0: batch, 1: seq},
        {0: kept},
        [
            {1: batch, 3: length} if tensors[places[0]].grows else {1: batch}
            for places in step.stacks
        ],
    )
    with recurrences_as_ops(skeleton):
        exported = _export(step, args, dynamic, skeleton)
    parts = {
        f"stacks_{number}": [(at, f"past_{tensors[at].name}") for at in places]
        for number, places in enumerate(step.stacks)
    }
    gm = _graph_of(exported, model, "model.", parts)
    if mask_form == "attended" and _adds_booleans(gm):
        return trace_causal_lm(model, "added")
    named = ("input_ids", "attention_mask", "position_ids", "logit_positions")
    check_causal_modules(skeleton, {module_path(node) for node in gm.graph.nodes})
    table = _learned_positions(gm)
    if table is not None:
        limits.append(LengthLimit(table, "its table of learned positions ends there"))
    limit = min(limits, key=lambda found: found.positions, default=None)
    interface = Interface(
        kind="causal_lm",
        inputs=(*named, *(f"past_{cached.name}" for cached in tensors)),
        outputs=("logits", *(cached.name for cached in tensors)),
        input_shapes=name_symbols(gm),
        float_dtype=dtype_name(dtype),
        vocab_size=int(skeleton.get_input_embeddings().weight.shape[0]),
        max_positions=limit.positions if limit else None,
        max_positions_reason=limit.reason if limit else "",
        positions_from_mask=_numbers_real_tokens(skeleton),
        cache=cached,
    )
    return gm, interface


def _zeros(count: int, cached: CachedTensor) -> Tensor:
    sizes = (PAST if size is None else size for size in cached.sizes)
    return torch.zeros(count, BATCH, *sizes, dtype=getattr(torch, cached.dtype))


def _graph_of(
    exported: ExportedProgram, model: nn.Module, strip: str, stacks: Stacks
) -> fx.GraphModule:
    """The plain graph; what it leaves undone is told in `gm.meta["trace_warnings"]`."""
    name = type(model).__name__
    check_deterministic(exported, name)
    results = returned_by(exported, name)
    gm = unlift(exported, results, strip, stacks)
    gm.meta["trace_warnings"] = tuple(f"{name}: {w}" for w in writes_dropped(exported, results))
    return gm


def _adds_booleans(gm: fx.GraphModule) -> bool:
    """Whether floats and booleans are added: a model that adds its mask to scores."""
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor:
            values = [x.meta["val"] for x in node.all_input_nodes]
            dtypes = {x.dtype for x in values if isinstance(x, Tensor)}
            if torch.bool in dtypes and any(dtype.is_floating_point for dtype in dtypes):
                return True
    return False


def _learned_positions(gm: fx.GraphModule) -> int | None:
    """How many positions a table serves that `position_ids` look up, or None without a table."""
    sizes = []
    for node in gm.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default:
            continue
        index, offset = node.args[1], 0
        while index.op == "call_function" and isinstance(index.args[0], fx.Node):
            if index.target is torch.ops.aten.add.Tensor and isinstance(index.args[1], int):
                offset += index.args[1]
            index = index.args[0]
        if index.target == "position_ids":
            sizes.append(int(node.args[0].meta["val"].shape[0]) - offset)
    return min(sizes, default=None)


def _numbers_real_tokens(model: nn.Module) -> bool:
    """Whether positions are counted by the attention mask where they are not given, as OPT's are.

    A table that could is given the mask; the model may number all tokens for it before, as
    BioGPT's does. So it is run on a padded prompt up to there.
    """
    for table in model.modules():
        reads = inspect.signature(table.forward).parameters
        if isinstance(table, nn.Embedding) and {"attention_mask", "position_ids"} <= reads.keys():
            given = _first_arguments(model, table).get("position_ids")
            return given is None or given.flatten().tolist() != [0, 1, 2]
    return False


class _Reached(Exception):
    """The module was called with these arguments by name."""


def _first_arguments(model: nn.Module, module: nn.Module) -> dict[str, Any]:
    """What a module is given by name when its model reads a row of one padding and two tokens."""

    def stop(_: nn.Module, args: Any, named: dict[str, Any]) -> None:
        raise _Reached(named)

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1]]))
    except _Reached as reached:
        return dict(reached.args[0])
    finally:
        hook.remove()
    return {}


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
        exported = _export(copied, args, dynamic, copied.model if names else copied)
        if names:
            gm = _graph_of(exported, copied.model, "model.", {})
            _name_inputs(gm, names)
        else:
            gm = _graph_of(exported, model, "", {})
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


_WHAT_IS_SERVED = (
    "panguq traces decoder-only transformers models, and any module given with example inputs"
)


def _export(
    module: nn.Module, args: tuple[Any, ...], dynamic: Any, source: nn.Module
) -> ExportedProgram:
    """Export a module; `source` is the one to blame."""
    # Nearly every call in a trace has sizes of its own: torch would fill a cache that none reads.
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with _naming_the_module(source), torch.no_grad(), uncached:
        exported = torch.export.export(module, args, dynamic_shapes=dynamic, strict=False)
        nodes = list(exported.graph_module.graph.nodes)
        if any(_writes(node) for node in nodes):
            exported = exported.run_decompositions({})  # writes in place become values
        if any(_is_unknown(node) for node in exported.graph_module.graph.nodes):
            exported = exported.run_decompositions(_decompositions())
        return exported


@contextmanager
def _naming_the_module(source: nn.Module) -> Iterator[None]:
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
        raise TraceError(
            f"cannot trace {_innermost_module(error, source)}: {first_line(error, typed=True)}",
            "the forward may depend on tensor values or fix a size; make it shape-polymorphic, "
            f"or compile the part of the model that is. {_WHAT_IS_SERVED}; {WHAT_TO_DO}",
        ) from error


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
    """The path of the deepest submodule on the traceback, found by its `self`."""
    paths = {id(m): name for name, m in root.named_modules()}
    found = type(root).__name__
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            name = paths[id(owner)]
            found = f"module {name} ({type(owner).__name__})"
        frame = frame.tb_next
    return found
