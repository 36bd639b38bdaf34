"""A program of `torch.export` as a plain graph: the user's inputs, and the module's results.

The exported program lists what the module wrote to beside what it returned, and hands weights over
as inputs. Here only results remain outputs, and weights are read by `get_attr` under the names
they have in the source model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument

from panguq.errors import TraceError
from panguq.ir.edit import ancestors, finish, set_tensor
from panguq.ir.node_meta import annotate
from panguq.ir.plain_names import is_input_name, weight_name
from panguq.tensors.safetensors_files import DTYPES

WHAT_TO_DO = "docs/contributing/when-a-model-does-not-trace.md shows what to do about each cause"
"""The hint of an error that is about the model's own code."""
_UNBIND = torch.ops.aten.unbind.int
_SIZE = torch.ops.aten.sym_size.int
Stacks = Mapping[str, Sequence[tuple[int, str]]]
"""Inputs that a forward unbinds first: for each part its place among all parts, and its name."""
_STATE = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


def check_deterministic(exported: ExportedProgram, name: str) -> None:
    """Raises TraceError, naming the module, for an op that draws random numbers."""
    for node in exported.graph_module.graph.nodes:
        if node.op == "call_function" and _draws(node):
            path = _path_below(node)
            raise TraceError(
                f"{name} is random by itself: {path or 'its forward'} calls {node.target}",
                "a compiled model gives one result for one input; switch the randomness off, "
                "or compile the part of the model that has none",
            )


def _draws(node: fx.Node) -> bool:
    """Whether this call reads the random generator, as dropout that is switched off does not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    declared = target._schema.arguments
    given = {a.name: a.default_value for a in declared if a.has_default_value()}
    given.update(zip((a.name for a in declared), node.args, strict=False))
    given.update(node.kwargs)
    switches = [given[key] for key in ("train", "training") if key in given]
    chances = [given[key] for key in ("p", "dropout_p") if key in given]
    off = False in switches or None in switches or 0 in chances
    return not off


def returned_by(exported: ExportedProgram, name: str) -> list[str]:
    """The names of the nodes that hold what the module returned.

    Raises TraceError for a result that is no tensor, and for one that an earlier call decides:
    a graph has no state.
    """
    found: list[str] = []
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            continue
        if not isinstance(spec.arg, TensorArgument):
            value = getattr(spec.arg, "value", None)
            what = repr(value) if spec.arg.name in ("", None) else "a size"
            raise TraceError(
                f"output {len(found)} of {name} is {what}, not a tensor",
                "return tensors only; wrap the module in one that drops the rest",
            )
        found.append(spec.arg.name)
    if not found:
        raise TraceError(f"{name} returns nothing", "let its forward return its results")
    _check_no_state(exported, name, found)
    return found


def _check_no_state(exported: ExportedProgram, name: str, results: list[str]) -> None:
    read = _read_by(exported, results)
    for buffer in _written(exported, *_STATE):
        if buffer in read:
            raise TraceError(
                f"{name} has a state: its result reads {buffer}, which its forward writes to",
                "a compiled graph gives the same result at every call; pass the state in and "
                "return it, or let forward leave it alone",
            )


def writes_dropped(exported: ExportedProgram, results: list[str]) -> Iterator[str]:
    """What the module writes to and the graph does not, as sentences for the user."""
    for given in _written(exported, OutputKind.USER_INPUT_MUTATION):
        yield f"forward writes to its input {given}; the compiled model leaves it as it is"
    for buffer in _written(exported, *_STATE):
        if buffer in _read_by(exported, _new_values(exported, buffer)):
            yield (f"forward updates {buffer}, which no result reads; the compiled model does not")


def _written(exported: ExportedProgram, *kinds: OutputKind) -> list[str]:
    specs = exported.graph_signature.output_specs
    return [str(spec.target) for spec in specs if spec.kind in kinds]


def _new_values(exported: ExportedProgram, buffer: str) -> list[str]:
    specs = exported.graph_signature.output_specs
    return [str(spec.arg.name) for spec in specs if spec.target == buffer]


def _read_by(exported: ExportedProgram, ends: list[str]) -> set[str]:
    """The names of the parameters and buffers whose values these nodes follow from."""
    nodes = {node.name: node for node in exported.graph_module.graph.nodes}
    sources = _sources(exported)
    needed = ancestors(nodes[name] for name in ends)
    return {sources[node.name] for node in needed if node.name in sources}


def _sources(exported: ExportedProgram) -> dict[str, str]:
    signature = exported.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def _path_below(node: fx.Node, strip: str = "") -> str:
    """The path of the source module that an exported node came from; empty at the top."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix(strip.rstrip(".")).lstrip(".")


def unlift(
    exported: ExportedProgram, results: list[str], strip: str, stacks: Stacks
) -> fx.GraphModule:
    """The exported graph with weights as get_attr and each of the `stacks` as its parts.

    Names that a graph cannot have are replaced by some like them. Raises TraceError for a weight
    that no file could hold.
    """
    sources = _sources(exported)
    tensors = {**exported.state_dict, **exported.constants}
    root, graph = nn.Module(), fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    names: dict[str, str] = {}
    nodes = list(exported.graph_module.graph.nodes)
    stacked = {n: stacks[n.name] for n in nodes if n.op == "placeholder" and n.name in stacks}
    unbinds = [u for stack in stacked for u in stack.users if u.target is _UNBIND]
    parts = {item: stacked[u.args[0]][int(item.args[1])] for u in unbinds for item in u.users}
    for node in nodes:
        if node.op == "placeholder" and node.name not in sources and node not in stacked:
            plain = node.name if is_input_name(node.name) else f"input_{len(mapping)}"
            mapping[node] = _placeholder(graph, plain, node)
    for item, (_, name) in sorted(parts.items(), key=lambda part: part[1]):
        mapping[item] = _placeholder(graph, name, item)
    for node in nodes:
        if node in mapping or node in stacked or node in unbinds:
            continue
        if node.op == "placeholder":
            if not node.users:
                continue
            source = sources[node.name].removeprefix(strip)
            tensor = tensors[sources[node.name]].detach()
            _check_tensor(source, tensor)
            names[source] = names.get(source) or weight_name(source, names.values())
            set_tensor(root, names[source], tensor)
            mapping[node] = graph.get_attr(names[source])
            mapping[node].meta["val"] = node.meta["val"]
            annotate(mapping[node], module_path=source.rpartition(".")[0])
        elif node.args and node.args[0] in stacked:  # a size of the stack is one of its parts'
            part = next(mapping[item] for item, of in parts.items() if of in stacked[node.args[0]])
            mapping[node] = graph.call_function(_SIZE, (part, int(node.args[1]) - 1))
            mapping[node].meta = {"val": node.meta["val"]}
        elif node.op == "output":
            named = {n.name: n for n in node.args[0] if isinstance(n, fx.Node)}
            graph.output(tuple(mapping[named[name]] for name in results))
        elif node.op == "get_attr":  # a graph of its own, for torch.cond, autocast and their like
            user = next(iter(node.users))
            path = _path_below(user, strip)
            raise TraceError(
                f"cannot trace {f'module {path}' if path else 'the model'}: {user.target} runs a "
                "part of it as a graph of its own, and panguq makes one graph of a model",
                WHAT_TO_DO,
            )
        elif node.op == "call_function":
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = {"val": node.meta.get("val")}
            annotate(mapping[node], module_path=_path_below(node, strip))
    gm = fx.GraphModule(root, graph)
    finish(gm)
    return gm


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise TraceError(
            f"weight {name} is {tensor.dtype}, {tensor.layout}; no artifact can hold that",
            "weights are dense tensors of float, integer or bool dtype",
        )


def _placeholder(graph: fx.Graph, name: str, source: fx.Node) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = source.meta["val"]
    return node


_KNOWN_SIZES = {
    ("input_ids", 0): "batch",
    ("input_ids", 1): "seq",
    ("logit_positions", 0): "kept",
}
_PAST_KEY = re.compile(r"past_key_\d+")


def _known_size(name: str, axis: int) -> str | None:
    """What a size of a causal language model's input is called."""
    if axis == 2 and _PAST_KEY.fullmatch(name):
        return "past"
    return _KNOWN_SIZES.get((name, axis))


def name_symbols(
    gm: fx.GraphModule, known: Mapping[tuple[str, int], str] | None = None
) -> dict[str, tuple[str | int, ...]]:
    """Give each symbolic size a name, keep it in `gm.meta`, and return the inputs' shapes.

    `known` are names by input and axis; without them, a language model's own.
    """
    names: dict[sympy.Symbol, str] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    causal = known is None and any(p.target == "input_ids" for p in placeholders)
    for p in placeholders:
        for d, size in enumerate(p.meta["val"].shape):
            expr = size.node.expr if isinstance(size, torch.SymInt) else None
            name = _known_size(str(p.target), d) if known is None else known.get((str(p.target), d))
            if isinstance(expr, sympy.Symbol) and (name or not causal):
                names.setdefault(expr, name or f"{p.target}_{d}")
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
