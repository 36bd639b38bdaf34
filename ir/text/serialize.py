"""Graphs as plain data: a list of nodes that names ops, weights and earlier nodes.

Nothing in such data is executed. Ops resolve only against `ir/ops/opset.py`. fx turns a graph into
Python source, so every text of a file that would appear there (names of inputs and weights,
keyword arguments) must be a plain name; all else appears there as a literal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from panguq.errors import RecipeError, StorageError
from panguq.files.strict_json import parse_json
from panguq.ir.edit import get_tensor, label, set_tensor, weights_of
from panguq.ir.node_meta import annotate, meta_of
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (defines ops that files name)
from panguq.ir.ops import experts as expert_ops  # noqa: F401
from panguq.ir.ops import linear_attention  # noqa: F401
from panguq.ir.ops.opset import name_of, resolve
from panguq.ir.quant_spec import Scheme, parse_scheme
from panguq.ir.text.file_checks import (
    FORMAT,
    VERSION,
    check_arguments,
    check_input_name,
    check_weight,
    check_weight_name,
    node_entries,
)
from panguq.ir.text.plain_arguments import DAMAGED, decode, encode
from panguq.ir.text.value_types import type_text

_FIELDS = {"label", "op", "target", "type", "args", "kwargs", "module_path", "scheme"}


def to_dict(gm: fx.GraphModule) -> dict[str, Any]:
    """The graph as JSON-able data, without the weights' values (see `edit.weights_of`).

    Raises StorageError, naming the node, for what files may not hold.
    """
    positions = {node: index for index, node in enumerate(gm.graph.nodes)}
    for name in weights_of(gm):
        check_weight_name(name, f"weight {name[:80]!r}")
    nodes = [_node_to_dict(gm, node, positions) for node in gm.graph.nodes]
    return {"format": FORMAT, "version": VERSION, "nodes": nodes}


def to_text(gm: fx.GraphModule) -> str:
    """`to_dict` as JSON, one line a node; equal graphs give equal bytes."""
    data = to_dict(gm)
    lines = ",\n".join(json.dumps(node, allow_nan=False) for node in data["nodes"])
    return f'{{"format": "{FORMAT}", "version": {VERSION}, "nodes": [\n{lines}\n]}}\n'


def from_text(
    text: str | bytes, tensors: Mapping[str, Tensor], source: str = "graph"
) -> fx.GraphModule:
    """The graph that `to_text` wrote; `source` names the file in errors."""
    return from_dict(parse_json(text, source), tensors, source)


def from_dict(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str = "graph"
) -> fx.GraphModule:
    """The graph that `to_dict` described, over the weights in `tensors`.

    Its nodes have no value types; `value_types.restore_types` computes them when a pass is to
    change the graph. Raises StorageError that says where, for anything malformed.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    built: list[fx.Node] = []
    for index, entry in enumerate(node_entries(data, source)):
        where = f"{source}: node {index}"
        if not isinstance(entry, dict) or not set(entry) <= _FIELDS:
            fields = sorted(set(entry) - _FIELDS) if isinstance(entry, dict) else entry
            raise StorageError(f"{where}: not a node, or unknown fields: {fields!s:.80}", DAMAGED)
        for name in ("label", "op", "target", "type", "module_path", "scheme"):
            if not isinstance(entry.get(name, ""), str):
                raise StorageError(f"{where}: {name} is not text", DAMAGED)
        where += f" ({entry.get('label', '')[:80]})"
        if built and built[-1].op == "output":
            raise StorageError(f"{where}: comes after the output", DAMAGED)
        node = _build_node(entry, graph, built, tensors, where)
        if node.op == "get_attr":
            _store_weight(root, str(node.target), tensors, where)
        _set_meta(node, entry, where)
        built.append(node)
    if not built or built[-1].op != "output":
        raise StorageError(f"{source}: the graph has no output", DAMAGED)
    return fx.GraphModule(root, graph)


# --- saving -----------------------------------------------------------------------------------


def _node_to_dict(
    gm: fx.GraphModule, node: fx.Node, positions: Mapping[fx.Node, int]
) -> dict[str, Any]:
    where, meta = f"node {label(node)}", meta_of(node)
    names = gm.meta.get("symbol_names", {})
    target = name_of(node.target) if node.op == "call_function" else str(node.target)
    if target is None:
        raise StorageError(
            f"{where}: {node.target} is not among the ops that a file may name",
            "ops come from define_op or the list in ir/ops/opset.py; add it there if it is pure",
        )
    entry: dict[str, Any] = {"label": label(node), "op": node.op, "target": target}
    if node.op == "placeholder":
        check_input_name(target, where)
    elif node.op not in ("get_attr", "call_function", "output"):
        raise StorageError(f"{where}: cannot save a node of kind {node.op}", "trace the model anew")
    if "val" in node.meta:
        entry["type"] = type_text(node.meta["val"], names)
    elif meta.stored_type is not None:
        entry["type"] = meta.stored_type
    if node.op == "get_attr":
        entry["type"] = type_text(get_tensor(gm, target), {})
    if node.args:
        entry["args"] = [encode(argument, positions, where) for argument in node.args]
    if node.kwargs:
        entry["kwargs"] = {k: encode(v, positions, where) for k, v in node.kwargs.items()}
    if meta.module_path:
        entry["module_path"] = meta.module_path
    if meta.scheme is not None:
        entry["scheme"] = _scheme_name(meta.scheme, where)
    return entry


def _scheme_name(scheme: Scheme, where: str) -> str:
    if parse_scheme(scheme.name) != scheme:
        raise StorageError(f"{where}: its scheme is not the one called {scheme.name}", "name it")
    return scheme.name


# --- loading ----------------------------------------------------------------------------------


def _build_node(
    entry: Mapping[str, Any],
    graph: fx.Graph,
    earlier: list[fx.Node],
    tensors: Mapping[str, Tensor],
    where: str,
) -> fx.Node:
    kind, target = entry.get("op"), entry.get("target", "")
    args, kwargs = entry.get("args", []), entry.get("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise StorageError(f"{where}: args is no list or kwargs no object", DAMAGED)
    if (kind in ("placeholder", "get_attr") and args) or (kind != "call_function" and kwargs):
        raise StorageError(f"{where}: a node of kind {kind} has no such arguments", DAMAGED)
    given = tuple(decode(a, earlier, f"{where}: args[{i}]") for i, a in enumerate(args))
    named = {k: decode(v, earlier, f"{where}: kwargs.{k[:40]}") for k, v in kwargs.items()}
    if kind == "placeholder":
        check_input_name(target, where)
        if any(n.op == "placeholder" and n.target == target for n in earlier):
            raise StorageError(f"{where}: a second input {target}", DAMAGED)
        return graph.placeholder(target)
    if kind == "get_attr":
        check_weight_name(target, where)
        check_weight(target, tensors, entry.get("type", ""), where)
        return graph.create_node("get_attr", target)
    if kind == "output":
        if len(given) != 1 or target != "output":
            raise StorageError(f"{where}: an output has one argument", DAMAGED)
        return graph.output(given[0])
    if kind != "call_function":
        raise StorageError(f"{where}: unknown kind of node {kind!s:.40}", DAMAGED)
    op = resolve(target)
    if op is None:
        raise StorageError(
            f"{where}: unknown op {target[:80]!r}",
            f"this version of panguq has no op {target[:80]}; load the file with the version that "
            "saved it, and import what defines the op if it is your own",
        )
    check_arguments(op, given, named, where)
    return graph.call_function(op, given, named)


def _store_weight(
    root: torch.nn.Module, name: str, tensors: Mapping[str, Tensor], where: str
) -> None:
    try:
        set_tensor(root, name, tensors[name])
    except (AttributeError, KeyError, TypeError) as error:
        raise StorageError(f"{where}: weight {name} lies inside another weight", DAMAGED) from error


def _set_meta(node: fx.Node, entry: Mapping[str, Any], where: str) -> None:
    annotate(node, label=entry.get("label", node.name), module_path=entry.get("module_path", ""))
    if "type" in entry:
        annotate(node, stored_type=entry["type"])
    if "scheme" in entry:
        try:
            annotate(node, scheme=parse_scheme(entry["scheme"]))
        except RecipeError as error:
            raise StorageError(f"{where}: {error.message}", error.hint) from error
