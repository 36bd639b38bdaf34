"""The only way graphs are changed: edits that keep labels, module paths and value types.

Every node carries in `node.meta`
  `val`      what the node yields, as a fake tensor (dtype, symbolic shape) or a SymInt
  `panguq`   its NodeMeta: label, module path and what passes know about it (node_meta.py)
Weights are buffers of the GraphModule, read by `get_attr` nodes whose target is their name.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from panguq.ir.node_meta import annotate, carry, carry_merged, meta_of
from panguq.ir.plain_names import weight_name
from panguq.tensors.folded_weight import FoldedWeight, materialized


def label(node: fx.Node) -> str:
    """The node's stable label; before canonicalize has given labels, fx's own name."""
    known = meta_of(node).label
    return node.name if known is None else known


def module_path(node: fx.Node) -> str:
    """The path of the source module that the node came from; empty at the top."""
    return meta_of(node).module_path


def op_name(node: fx.Node) -> str:
    """Short name of a call's op: `linear`, `rms_norm`, `sym_size`."""
    if isinstance(node.target, OpOverload):
        return node.target.name().split("::")[1].split(".")[0]
    return getattr(node.target, "__name__", str(node.target))


def assign_labels(gm: fx.GraphModule) -> None:
    """Label every node: module path, canonical op, and an ordinal where that is not unique."""
    seen: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_function":
            base = f"{module_path(node)}:{op_name(node)}".lstrip(":")
            annotate(node, label=f"{base}.{seen[base]}" if seen[base] else base)
            seen[base] += 1
        else:
            annotate(node, label=str(node.target) if node.op != "output" else "output")


def find_label(gm: fx.GraphModule, wanted: str) -> fx.Node:
    """The node with this label; KeyError if there is none."""
    for node in gm.graph.nodes:
        if label(node) == wanted:
            return node
    raise KeyError(wanted)


def operands(node: fx.Node) -> list[tuple[int | str, fx.Node]]:
    """The nodes that a call reads, with the position or keyword of the argument."""
    found: list[tuple[int | str, fx.Node]] = []
    arguments: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    for position, argument in arguments:
        read: list[fx.Node] = []
        fx.map_arg(argument, read.append)
        found += [(position, operand) for operand in read]
    return found


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """The fake mode that the graph's value types live in."""
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode()


def value_types(args: Any) -> Any:
    """`args` with every node replaced by the value type it carries."""
    return fx.map_arg(args, lambda node: node.meta["val"])


def call(
    before: fx.Node,
    op: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    origin: fx.Node,
    suffix: str = "",
) -> fx.Node:
    """Insert a call of `op` in front of `before`; its value type follows from the op's fake.

    The new node belongs to `origin`'s module and is labelled `<origin's label><suffix>`.
    """
    graph = before.graph
    named = dict(kwargs or {})
    with graph.inserting_before(before):
        node = graph.call_function(op, args, named)
    owner = graph.owning_module
    assert owner is not None
    with fake_mode(owner), torch.no_grad():
        node.meta["val"] = op(*value_types(args), **value_types(named))
    known = meta_of(origin).label
    name = None if known is None else known + suffix
    annotate(node, label=name, module_path=module_path(origin))
    return node


def retarget(node: fx.Node, op: OpOverload) -> None:
    """Let `node` call another op of the same arguments and the same value."""
    node.target = op


def read_instead(node: fx.Node, position: int, value: fx.Node) -> None:
    """Let `node` read `value` as its argument at this position."""
    node.update_arg(position, value)


def get_tensor(gm: fx.GraphModule, name: str) -> Tensor:
    """The weight called `name`."""
    owner, _, leaf = name.rpartition(".")
    return getattr(gm.get_submodule(owner), leaf)


def set_tensor(gm: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Store a weight under a dotted name, replacing what was there."""
    owner: torch.nn.Module = gm
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner.register_buffer(leaf, tensor)


def free_name(gm: fx.GraphModule, name: str) -> str:
    """`name`, or one like it that a weight may have; with an ordinal if it is taken."""
    taken = {buffer for buffer, _ in gm.named_buffers(remove_duplicate=False)}
    name = weight_name(name, taken)
    numbered = (f"{name}_{ordinal}" for ordinal in itertools.count(1))
    return name if name not in taken else next(n for n in numbered if n not in taken)


def tensor_node(before: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    """Store `tensor` as weight `name` and insert the `get_attr` that reads it."""
    graph = before.graph
    owner = graph.owning_module
    assert owner is not None
    set_tensor(owner, name, tensor)
    with graph.inserting_before(before):
        node = graph.get_attr(name)
    node.meta["val"] = fake_of(owner, tensor)
    annotate(node, label=name, module_path=name.rpartition(".")[0])
    return node


def fake_of(gm: fx.GraphModule, tensor: Tensor) -> FakeTensor:
    """The value type of a weight, in the graph's own fake mode."""
    return fake_mode(gm).from_tensor(tensor, static_shapes=True)


def weights_of(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Every weight that the graph reads, by name, in the order of first use."""
    names = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "get_attr")
    return {name: get_tensor(gm, name) for name in names}


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` read `new`, and drop `old` and what only it needed.

    `new` takes over what passes know about `old`, unless it is one of `old`'s operands.
    """
    if new not in old.all_input_nodes:
        carry(old, new)
    _supplant(old, new)


def split(old: fx.Node, main: fx.Node, side: fx.Node, total: fx.Node) -> None:
    """As `replace`, by `total`, the sum of two parts of `old`'s work.

    `main` has what passes know about `old`, `side` the label of what it was split from.
    """
    carry(old, main)
    annotate(side, split_from=label(old))
    _supplant(old, total)


def divide(old: fx.Node, parts: Sequence[fx.Node], total: fx.Node) -> None:
    """As `replace`, by `total`, the sum of `parts`, all of which have what passes know about it."""
    for part in parts:
        carry(old, part)
    _supplant(old, total)


def merge(parts: Sequence[fx.Node], merged: fx.Node, results: Sequence[fx.Node]) -> None:
    """As `replace`, each of `parts` by one of `results`, which are cut from `merged`.

    All parts read one value under one scheme; `merged` has what passes know about them.
    """
    carry_merged(parts, merged)
    for part, result in zip(parts, results, strict=True):
        _supplant(part, result)


def _supplant(old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    erase_unused([old])


def erase_unused(nodes: Iterable[fx.Node]) -> None:
    """Erase these nodes where nobody reads them, and then what they alone had read."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        erased = getattr(node, "_erased", False)
        if erased or node.users or node.op in ("placeholder", "output"):
            continue
        inputs = list(node.all_input_nodes)
        node.graph.erase_node(node)
        stack.extend(inputs)


def finish(gm: fx.GraphModule) -> None:
    """After a pass: drop weights nobody reads, check the graph's form, regenerate its code."""
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name, _ in list(gm.named_buffers(remove_duplicate=False)):
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            del gm.get_submodule(owner)._buffers[leaf]
    for name, module in reversed(list(gm.named_modules())):
        if name and not module._buffers and not module._modules:
            owner, _, leaf = name.rpartition(".")
            del gm.get_submodule(owner)._modules[leaf]
    gm.graph.lint()
    gm.recompile()


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A second graph that shares the weights' storage with the first."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    last = graph.output(output)
    last.meta = dict(next(reversed(gm.graph.nodes)).meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    root = torch.nn.Module()
    for name, tensor in weights_of(gm).items():
        set_tensor(root, name, tensor)
    copy = fx.GraphModule(root, graph)
    copy.meta = dict(gm.meta)
    return copy


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """These nodes and all they depend on, not looking beyond `stop`."""
    found: set[fx.Node] = set()
    ends = set(stop)
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node not in ends:
                stack.extend(node.all_input_nodes)
    return found


def store_folded(gm: fx.GraphModule, put: Callable[[Tensor], Tensor]) -> None:
    """Compute the weights that still are products; `put` says where each is kept."""
    for name, tensor in weights_of(gm).items():
        if isinstance(tensor, FoldedWeight):
            set_tensor(gm, name, put(materialized(tensor)))
