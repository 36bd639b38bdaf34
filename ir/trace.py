"""A module as an fx graph of ATen ops, with dynamic sizes and the KV cache as plain tensors.

`torch.export` (non-strict) runs the module on fake tensors, so a trace costs no weights. Every
size is at least 2 while tracing, because export bakes in the sizes 0 and 1; the graph itself
then serves those too. The exported graph is rewritten so that its inputs are the user's alone
and weights are read by `get_attr` under the names they have in the source model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from panguq.errors import TraceError
from panguq.ir.edit import finish, set_tensor
from panguq.ir.interface import CacheLayer, Interface
from panguq.ir.node_meta import annotate

_UNBIND = torch.ops.aten.unbind.int
_SIZE = torch.ops.aten.sym_size.int
BATCH, SEQ, PAST, KEPT = 3, 5, 7, 2  # all different, none of them 0 or 1


class _CausalLM(nn.Module):
    """A transformers causal language model with its cache as two stacked tensors.

    Stacking gives all layers one symbol for the length of the past; the stacks disappear
    again when the graph is unlifted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
    ) -> tuple[Tensor, ...]:
        from panguq.kv_cache import cache_argument, cache_of, layer_tensors, make_cache

        layers = zip(past_keys.unbind(0), past_values.unbind(0), strict=True)
        past = [tensor for pair in layers for tensor in pair]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=logit_positions,
            **{cache_argument(self.model.forward): make_cache(past)},
        )
        return output.logits, *layer_tensors(cache_of(output))


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares all tensors, to be changed freely for tracing."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors}).eval()


def _fake_mode_of(model: nn.Module) -> AbstractContextManager[Any]:
    for tensor in [*model.parameters(), *model.buffers()]:
        mode = getattr(tensor, "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    return nullcontext()


def is_causal_lm(model: Any) -> bool:
    """Whether this is a transformers model that continues token sequences from a cache."""
    return hasattr(model, "config") and hasattr(model, "generate") and model.can_generate()


def trace_causal_lm(model: nn.Module) -> tuple[fx.GraphModule, Interface]:
    """Trace a transformers causal language model; its weights are shared, not copied.

    Raises TraceError, naming the module at fault, if the model cannot be exported.
    """
    skeleton: Any = skeleton_of(model)
    config = skeleton.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise TraceError(f"{type(model).__name__} is an encoder-decoder model", _WHAT_IS_SERVED)
    skeleton.set_attn_implementation("sdpa")
    layers = int(config.num_hidden_layers)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = next(skeleton.parameters()).dtype
    with _fake_mode_of(model):
        past = torch.zeros(layers, BATCH, heads, PAST, int(head_dim), dtype=dtype)
        positions = torch.arange(PAST, PAST + SEQ).expand(BATCH, SEQ)
        args = (
            torch.zeros(BATCH, SEQ, dtype=torch.long),
            torch.ones(BATCH, 1, SEQ, PAST + SEQ, dtype=torch.bool),
            positions,
            torch.arange(KEPT),
            past,
            past.clone(),
        )
    batch, seq, kept, length = Dim("batch"), Dim("seq"), Dim("kept"), Dim("past")
    stack = {1: batch, 3: length}
    dynamic = (
        {0: batch, 1: seq},
        {0: batch, 2: seq, 3: Dim.AUTO},
        {0: batch, 1: seq},
        {0: kept},
        stack,
        stack,
    )
    exported = _export(_CausalLM(skeleton), args, dynamic)
    gm = _unlift(exported, strip="model.", split={"past_keys": "key", "past_values": "value"})
    cache = [f"{kind}_{i}" for i in range(layers) for kind in ("key", "value")]
    named = ("input_ids", "attention_mask", "position_ids", "logit_positions")
    interface = Interface(
        kind="causal_lm",
        inputs=(*named, *(f"past_{name}" for name in cache)),
        outputs=("logits", *cache),
        input_shapes=_name_symbols(gm),
        float_dtype=str(dtype).removeprefix("torch."),
        vocab_size=int(skeleton.get_input_embeddings().weight.shape[0]),
        max_positions=min(filter(None, (_learned_positions(gm), _window(config))), default=None),
        positions_from_mask=_numbers_real_tokens(skeleton),
        cache=tuple(
            CacheLayer(heads=heads, key_dim=int(head_dim), value_dim=int(head_dim))
            for _ in range(layers)
        ),
    )
    return gm, interface


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
    """Whether a position table counts positions by the attention mask, as OPT's does."""
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return any("attention_mask" in inspect.signature(t.forward).parameters for t in tables)


def _window(config: Any) -> int | None:
    """Tokens up to which attention over a sliding window is plain causal attention, if it has one.

    The graph's mask is causal, so longer sequences would be computed wrongly and are refused.
    """
    window = getattr(config, "sliding_window", None)
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


def trace_module(
    model: nn.Module, example_inputs: Sequence[Tensor]
) -> tuple[fx.GraphModule, Interface]:
    """Trace any module that maps tensors to a tensor or a tuple of tensors.

    Sizes of the example inputs stay dynamic wherever the module allows it; they must be at
    least 2. Raises TraceError otherwise, or if the module cannot be exported.
    """
    for index, example in enumerate(example_inputs):
        if not isinstance(example, Tensor) or min(example.shape, default=2) < 2:
            raise TraceError(
                f"example input {index} of {type(model).__name__} is not a tensor with every "
                f"size at least 2: {getattr(example, 'shape', type(example).__name__)}",
                "sizes 0 and 1 would be baked into the graph; give a larger example",
            )
    dynamic: tuple[Any, ...] = tuple({d: Dim.AUTO for d in range(e.dim())} for e in example_inputs)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # `*inputs` is one argument to export
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        dynamic = (*dynamic[:named], dynamic[named:])
    exported = _export(skeleton_of(model), tuple(example_inputs), dynamic)
    gm = _unlift(exported, strip="", split={})
    results = next(reversed(gm.graph.nodes)).args[0]
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    interface = Interface(
        kind="module",
        inputs=tuple(str(n.target) for n in gm.graph.nodes if n.op == "placeholder"),
        outputs=tuple(f"output_{i}" for i in range(len(results))),
        input_shapes=_name_symbols(gm),
        float_dtype=str(floats[0] if floats else torch.float32).removeprefix("torch."),
        returns="tensor" if exported.call_spec.out_spec.is_leaf() else "tuple",
        size_limits=_size_limits(gm, exported),
    )
    return gm, interface


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
WHAT_TO_DO = "docs/contributing/when-a-model-does-not-trace.md shows what to do about each cause"
"""The hint of an error that is about the model's own code."""


def _export(module: nn.Module, args: tuple[Any, ...], dynamic: Any) -> ExportedProgram:
    try:
        with torch.no_grad():
            exported = torch.export.export(module, args, dynamic_shapes=dynamic, strict=False)
            if any(_writes(node) for node in exported.graph_module.graph.nodes):
                exported = exported.run_decompositions({})  # writes in place become values
            return exported
    except Exception as error:
        source = module.model if isinstance(module, _CausalLM) else module
        raise TraceError(
            f"cannot trace {_innermost_module(error, source)}: {_first_line(error)}",
            "the forward may depend on tensor values or fix a size; make it shape-polymorphic, "
            f"or compile the part of the model that is. {_WHAT_IS_SERVED}; {WHAT_TO_DO}",
        ) from error


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"


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


def _unlift(exported: ExportedProgram, strip: str, split: dict[str, str]) -> fx.GraphModule:
    """The exported graph with weights as get_attr and each stack in `split` as its parts."""
    signature = exported.graph_signature
    sources = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**exported.state_dict, **exported.constants}
    root, graph = nn.Module(), fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    nodes = list(exported.graph_module.graph.nodes)
    stacks = [n for n in nodes if n.op == "placeholder" and n.name in split]
    unbinds = [u for stack in stacks for u in stack.users if u.target is _UNBIND]
    items = {item: str(unbind.args[0]) for unbind in unbinds for item in unbind.users}
    in_layer_order = sorted(items, key=lambda item: (item.args[1], items[item]))
    for node in nodes:
        if node.op == "placeholder" and node.name not in sources and node.name not in split:
            mapping[node] = _placeholder(graph, node.name, node)
    for item in in_layer_order:
        mapping[item] = _placeholder(graph, f"past_{split[items[item]]}_{item.args[1]}", item)
    for node in nodes:
        if node.op == "placeholder" and node.name in sources:
            if not node.users:
                continue
            name = sources[node.name].removeprefix(strip)
            set_tensor(root, name, tensors[sources[node.name]].detach())
            mapping[node] = graph.get_attr(name)
            mapping[node].meta["val"] = node.meta["val"]
            annotate(mapping[node], module_path=name.rpartition(".")[0])
        elif node in mapping or node in stacks or node in unbinds:
            continue
        elif node.args and node.args[0] in stacks:  # a size of the stack is one of its parts'
            part = mapping[in_layer_order[0]]
            mapping[node] = graph.call_function(_SIZE, (part, int(node.args[1]) - 1))
            mapping[node].meta = {"val": node.meta["val"]}
        elif node.op == "output":
            graph.output(tuple(mapping[n] for n in node.args[0]))
        elif node.op == "get_attr":  # a graph of its own, for torch.cond, autocast and their like
            user = next(iter(node.users))
            path = _path_of(user, strip)
            raise TraceError(
                f"cannot trace {f'module {path}' if path else 'the model'}: {user.target} runs a "
                "part of it as a graph of its own, and panguq makes one graph of a model",
                WHAT_TO_DO,
            )
        elif node.op == "call_function":
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = {"val": node.meta.get("val")}
            annotate(mapping[node], module_path=_path_of(node, strip))
    gm = fx.GraphModule(root, graph)
    finish(gm)
    return gm


def _path_of(node: fx.Node, strip: str) -> str:
    """The path of the source module that an exported node came from; empty at the top."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    return path.removeprefix(strip.rstrip(".")).lstrip(".")


def _placeholder(graph: fx.Graph, name: str, source: fx.Node) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = source.meta["val"]
    return node


_KNOWN_SIZES = {
    ("input_ids", 0): "batch",
    ("input_ids", 1): "seq",
    ("logit_positions", 0): "kept",
    ("past_key_0", 2): "past",
}


def _name_symbols(gm: fx.GraphModule) -> dict[str, tuple[str | int, ...]]:
    """Give each symbolic size a name, keep it in `gm.meta`, and return the inputs' shapes."""
    names: dict[sympy.Symbol, str] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    causal = any(p.target == "input_ids" for p in placeholders)
    for p in placeholders:
        for d, size in enumerate(p.meta["val"].shape):
            expr = size.node.expr if isinstance(size, torch.SymInt) else None
            if isinstance(expr, sympy.Symbol) and (not causal or (p.target, d) in _KNOWN_SIZES):
                names.setdefault(expr, _KNOWN_SIZES.get((str(p.target), d), f"{p.target}_{d}"))
    gm.meta["symbol_names"] = names
    gm.meta["spelled_sizes"] = {}
    return {str(p.target): shape_of(gm, p) for p in placeholders}


def shape_of(gm: fx.GraphModule, node: fx.Node) -> tuple[str | int, ...]:
    """The node's shape with symbols under their names: `("batch", "past + seq", 576)`."""
    names = gm.meta.get("symbol_names", {})
    spelled: dict[sympy.Expr, str] = gm.meta.setdefault("spelled_sizes", {})

    def spell(size: int | torch.SymInt) -> str | int:
        if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
            return int(size)
        expr = size.node.expr
        if expr not in spelled:
            named = {s: sympy.Symbol(names[s]) for s in expr.free_symbols if s in names}
            spelled[expr] = str(expr.subs(named))
        return spelled[expr]

    return tuple(spell(s) for s in node.meta["val"].shape)
