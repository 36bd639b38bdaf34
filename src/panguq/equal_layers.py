"""Equal layers are traced once: a trace of a large model takes as long as one of a few layers.

A model's layers are compared by what they are made of. From some layer on they mostly repeat, one
by one or in a pattern (`sliding, sliding, full`). A model of the layers before that and of three
such patterns is traced, and the last pattern is copied in the graph as often as the model has it.
The copies are right if the last two are the same ops on the same values, which is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from panguq.ir.edit import assign_labels, finish, get_tensor, module_path, set_tensor
from panguq.ir.export import skeleton_of
from panguq.ir.interface import CacheLayer, Interface, cached_tensors
from panguq.ir.node_meta import annotate
from panguq.ir.trace_causal_lm import is_causal_lm
from panguq.ir.views import results_of

_PLAIN = (bool, int, float, str, torch.dtype, torch.Size, type(None))
_WHERE = re.compile(r"idx|^layer_id$|^layer_number$|^block_id$")
"""Attributes that only say where a layer is."""


class NotEqualError(Exception):
    """The layers that were traced are not the same graph twice."""


@dataclass(frozen=True)
class Pattern:
    """Layers `start` to the end repeat every `period`; the last repetition may be cut short.

    `layers` are those of the model; `kept`, the first ones, are enough to know all.
    """

    layers: int
    start: int
    period: int

    @property
    def kept(self) -> int:
        """How many layers stand for all: those before, two repetitions, and what is left over."""
        return self.start + 2 * self.period + (self.layers - self.start) % self.period

    @property
    def copies(self) -> int:
        """How often the second repetition is to be copied."""
        return (self.layers - self.kept) // self.period

    @property
    def first_copied(self) -> int:
        """The first layer of the second repetition."""
        return self.start + self.period

    def stands_for(self, layer: int) -> int:
        """The layer of the shorter model that is equal to `layer` of the whole."""
        end = self.first_copied + self.period
        if layer < end:
            return layer
        if layer >= end + self.copies * self.period:
            return layer - self.copies * self.period
        return self.first_copied + (layer - self.first_copied) % self.period


def pattern_of(kinds: list[Any]) -> Pattern | None:
    """The pattern that leaves the fewest layers; None where that would be all of them.

    Its first repetition counts as before it: such layers may make what all later ones read.
    """
    best: Pattern | None = None
    for period in range(1, len(kinds) // 3 + 1):
        start = len(kinds) - period
        while start > 0 and kinds[start - 1] == kinds[start - 1 + period]:
            start -= 1
        found = Pattern(len(kinds), start + period, period)
        if found.copies > 0 and (best is None or found.kept < best.kept):
            best = found
    return best


@dataclass(frozen=True)
class ShortModel:
    """A language model of the first layers of another, with which it shares all tensors."""

    model: nn.Module
    path: str
    pattern: Pattern

    def whole(self, gm: fx.GraphModule, interface: Interface) -> Interface:
        """Copy layers in the graph of the short model until it is that of the whole.

        Returns the whole model's interface. Raises NotEqualError, with the graph unchanged, where
        layers that should be the same were traced as different ones.
        """
        return copy_layers(gm, interface, self.path, self.pattern)

    def with_weights(self, gm: fx.GraphModule, interface: Interface, model: nn.Module) -> Interface:
        """As `whole`; the layers have the weights of `model`, of which this is the short one.

        Raises NotEqualError where the graph of the whole would not read one weight for each of the
        copies' own, or would warn of more than this one.
        """
        if gm.meta.get("trace_warnings"):
            raise NotEqualError("the trace warns, maybe of one layer among many")
        interface = self.whole(gm, interface)
        parameters = model.named_parameters(remove_duplicate=False)
        known = dict([*parameters, *model.named_buffers(remove_duplicate=False)])
        read = [str(node.target) for node in gm.graph.nodes if node.op == "get_attr"]
        names = [name for name in dict.fromkeys(read) if name.startswith(f"{self.path}.")]
        for name in names:
            stand_in, own = get_tensor(gm, name), known.get(name)
            if own is None or (own.shape, own.dtype) != (stand_in.shape, stand_in.dtype):
                raise NotEqualError(f"{name} is not the weight that its layer reads")
            set_tensor(gm, name, own.detach())
        if len({id(known[name]) for name in names}) != len(names):
            raise NotEqualError("two layers share a weight")
        return interface


def short_model(
    model: nn.Module, layer_settings: Callable[[str], Any] = lambda path: None
) -> ShortModel | None:
    """The model with equal layers left out; None where it has none, or no list of layers.

    layer_settings: what else is said of the module at a path, such as its scheme; layers for which
    that differs are not equal.
    """
    if not is_causal_lm(model):
        return None
    found = _list_of_layers(model)
    if found is None:
        return None
    path, layers = found
    lists = _lists_of_config(model, len(layers))
    kinds = [
        (_kind(layer, f"{path}.{i}", layer_settings), [repr(values[i]) for _, _, values in lists])
        for i, layer in enumerate(layers)
    ]
    pattern = pattern_of(kinds)
    if pattern is None:
        return None
    short = skeleton_of(model)
    parent, _, name = path.rpartition(".")
    kept: Any = short.get_submodule(path)
    setattr(short.get_submodule(parent), name, kept[: pattern.kept])
    config: Any = short.config
    config.get_text_config(decoder=True).num_hidden_layers = pattern.kept
    for part, key, values in _lists_of_config(short, len(layers)):
        setattr(part, key, type(values)(values[: pattern.kept]))
    return ShortModel(short, path, pattern)


def _list_of_layers(model: Any) -> tuple[str, list[nn.Module]] | None:
    """The one list that has as many modules as the config has layers, each of its own."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1 or len({id(layer) for layer in lists[0][1]}) != count:
        return None
    return lists[0]


def _lists_of_config(model: Any, count: int) -> list[tuple[Any, str, Any]]:
    """(config, key, value) of what the configuration says of each layer."""
    config = model.config
    parts = {id(part): part for part in (config, config.get_text_config(decoder=True))}
    return [
        (part, key, value)
        for part in parts.values()
        for key, value in vars(part).items()
        if isinstance(value, list | tuple) and len(value) == count
    ]


def _kind(layer: nn.Module, path: str, settings: Callable[[str], Any]) -> list[Any]:
    """What a layer is made of, to be compared with others'."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        found.append((name, type(module), settings(f"{path}.{name}".rstrip("."))))
        found += [
            (key, value)
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and not _WHERE.search(key) and _is_plain(value)
        ]
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found += [(key, tensor.shape, tensor.dtype) for key, tensor in tensors]
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return isinstance(value, _PLAIN)


# --- in the graph -------------------------------------------------------------------------------


def copy_layers(gm: fx.GraphModule, interface: Interface, path: str, pattern: Pattern) -> Interface:
    """Copy the second repetition of the pattern behind itself, in a canonical graph.

    path: of the list of layers. Returns the interface of the graph as it is then. Raises
    NotEqualError, with the graph unchanged.
    """
    graph = _Layers(gm, interface, path)
    middle, end = pattern.first_copied, pattern.first_copied + pattern.period
    one, two = graph.nodes_of(pattern.start, middle), graph.nodes_of(middle, end)
    if len(interface.cache) != pattern.kept:
        raise NotEqualError("not every layer has a cache of its own")
    graph.check_equal(one, two, pattern.period)
    tail = graph.nodes_of(end, pattern.kept)
    results = dict(zip(interface.outputs, results_of(gm), strict=True))
    copies: list[dict[fx.Node, fx.Node]] = []
    previous = two
    for number in range(1, pattern.copies + 1):
        became = graph.copy(two, dict(zip(one, previous, strict=True)), previous)
        previous = [became[node] for node in two]
        copies.append(became)
        graph.renumber(previous, number * pattern.period)
    graph.renumber(tail, pattern.copies * pattern.period)
    made = {node for became in copies for node in became.values()}
    for node in two:
        for user in list(node.users):
            if user not in made and user not in set(two) and user is not graph.output:
                user.replace_input_with(node, copies[-1][node])

    cache = tuple(interface.cache[pattern.stands_for(layer)] for layer in range(pattern.layers))
    inputs = {n: s for n, s in interface.input_shapes.items() if n not in graph.cached}
    outputs = {n: node for n, node in results.items() if f"past_{n}" not in graph.cached}
    for layer, names in enumerate(_names(cache, interface.float_dtype)):
        source = pattern.stands_for(layer)
        number = (layer - source) // pattern.period if middle <= source < end else 0
        for name, old in zip(names, graph.names[source], strict=True):
            inputs[f"past_{name}"] = interface.input_shapes[f"past_{old}"]
            node = results[old]
            outputs[name] = copies[number - 1].get(node, node) if number else node
    graph.output.args = (tuple(outputs.values()),)
    assign_labels(gm)
    finish(gm)
    return interface.model_copy(
        update={
            "inputs": tuple(inputs),
            "outputs": tuple(outputs),
            "input_shapes": inputs,
            "cache": cache,
        }
    )


def _names(cache: Sequence[CacheLayer], float_dtype: str) -> list[list[str]]:
    """Names of the tensors that each layer keeps."""
    names: list[list[str]] = [[] for _ in cache]
    for tensor in cached_tensors(cache, float_dtype):
        names[tensor.layer].append(tensor.name)
    return names


class _Layers:
    """A graph's nodes by the layer that they belong to."""

    def __init__(self, gm: fx.GraphModule, interface: Interface, path: str) -> None:
        self.gm = gm
        self.nodes: list[fx.Node] = list(gm.graph.nodes)
        self.output = self.nodes[-1]
        self.number = re.compile(rf"^({re.escape(path)}\.)(\d+)(?=\.|$)")
        self.names = _names(interface.cache, interface.float_dtype)
        self.cached = {f"past_{n}": i for i, names in enumerate(self.names) for n in names}
        self.layer = {node: self._layer(node) for node in self.nodes}
        self.tensors = {
            str(node.target): get_tensor(gm, str(node.target))
            for node in self.nodes
            if node.op == "get_attr"
        }

    def _layer(self, node: fx.Node) -> int:
        """Its layer; -1 for a node that is in none."""
        if node.op == "placeholder":
            return self.cached.get(str(node.target), -1)
        known = self.number.search(module_path(node))
        return int(known[2]) if known else -1

    def nodes_of(self, first: int, end: int) -> list[fx.Node]:
        """The nodes of layers `first` to `end`, in the graph's order."""
        return [node for node in self.nodes if first <= self.layer[node] < end]

    def check_equal(self, one: list[fx.Node], two: list[fx.Node], period: int) -> None:
        """Raises NotEqualError unless `two` does with what `one` gives what `one` did before."""
        if len(one) != len(two) or not one:
            raise NotEqualError("two layers have another number of nodes")
        place = {node: i for block in (one, two) for i, node in enumerate(block)}
        inside, late = (set(one), set(two)), self._late(self.layer[one[0]])
        for first, second in zip(one, two, strict=True):
            if self._text(first, period) != self._text(second, 0):
                raise NotEqualError(f"{first.name} and {second.name} differ")
            read = zip(first.all_input_nodes, second.all_input_nodes, strict=False)
            for before, after in read:
                own = before in inside[0] and after in inside[1] and place[before] == place[after]
                handed_on = before not in inside[0] and after in inside[0]
                if not own and not handed_on and (before is not after or before in late):
                    raise NotEqualError(f"{first.name} and {second.name} read different values")
        allowed = {*one, *two, self.output}
        if any(user not in allowed for node in one for user in node.users):
            raise NotEqualError("a later layer reads what an earlier one made")
        if any(self.layer[user] >= 0 for node in late for user in node.users):
            raise NotEqualError("there is something between the layers")

    def _late(self, start: int) -> set[fx.Node]:
        """Nodes outside of all layers that depend on layer `start` or a later one."""
        depends: set[fx.Node] = set()
        for node in self.nodes:
            if self.layer[node] >= start or any(read in depends for read in node.all_input_nodes):
                depends.add(node)
        return {node for node in depends if self.layer[node] < 0}

    def _text(self, node: fx.Node, shift: int) -> str:
        """What the node is, as if `shift` layers later, without the nodes that it reads."""
        value = node.meta.get("val")
        kind = (str(getattr(value, "shape", "")), str(getattr(value, "dtype", "")))
        arguments = fx.map_arg((node.args, dict(node.kwargs)), lambda read: "%")
        target = node.target if node.op == "call_function" else self._renamed(node, shift)
        path = self._in_layer(module_path(node), shift)
        return repr((node.op, str(target), path, kind, arguments, len(node.all_input_nodes)))

    def _in_layer(self, path: str, shift: int) -> str:
        return self.number.sub(lambda found: f"{found[1]}{int(found[2]) + shift}", path)

    def _renamed(self, node: fx.Node, shift: int) -> str:
        if node.op == "placeholder":
            layer = self.cached[str(node.target)]
            return str(node.target).replace(f"_{layer}", f"_{layer + shift}", 1)
        return self._in_layer(str(node.target), shift)

    def copy(
        self, nodes: list[fx.Node], became: Mapping[fx.Node, fx.Node], behind: list[fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """Copies of `nodes` behind `behind`, which are copies, too: inputs behind inputs, weights
        behind weights. They read what `became` has in place of what `nodes` read."""
        last = {node.op: node for node in behind}
        made: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            with self.gm.graph.inserting_after(last[node.op]):
                made[node] = self.gm.graph.node_copy(
                    node, lambda read: made.get(read) or became.get(read, read)
                )
            last[node.op] = made[node]
        return made

    def renumber(self, nodes: Iterable[fx.Node], shift: int) -> None:
        """Let nodes belong to the layer `shift` layers behind theirs."""
        for node in nodes:
            if node.op != "call_function":
                old, node.target = str(node.target), self._renamed(node, shift)
                node._rename(node.target.replace(".", "_"))
                if node.op == "get_attr":
                    set_tensor(self.gm, node.target, self.tensors[old])
            annotate(node, module_path=self._in_layer(module_path(node), shift))
