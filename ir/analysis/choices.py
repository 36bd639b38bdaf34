"""Which matmuls decide something: a router's scores say which experts a token goes to.

A choice has no nearly right result: a small error of a score can send a token to another expert. It
is found where an index follows from values (topk, argmax, sort and their like); what decides it are
the linears behind those values, up to the last ones before the choice.
"""

from __future__ import annotations

import torch
from torch import fx

from panguq.ir.canonical_views import Attention
from panguq.ir.views import Item, Linear

aten = torch.ops.aten

_ALWAYS = (aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable)
_SECOND = (
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.max.dim,
    aten.min.dim,
    aten.kthvalue.default,
    aten.median.dim,
)
"""Ops whose second result is the index."""


def deciding_linears(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Every linear on whose result a choice depends, with no other linear or attention between.

    The value is the call that makes the choice.
    """
    found: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if not _chooses(node):
            continue
        seen: set[fx.Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            source = stack.pop()
            if source in seen:
                continue
            seen.add(source)
            if Linear.match(source) is not None:
                found.setdefault(source, node)
            elif source.op == "call_function" and Attention.match(source) is None:
                stack.extend(source.all_input_nodes)
    return found


def chosen_values(gm: fx.GraphModule, values: set[fx.Node]) -> set[fx.Node]:
    """What choices that depend on `values` give, and what follows from it, up to the next matmuls
    and the next of `values`: a router's experts, their order and their weights."""
    behind: set[fx.Node] = set(values)
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if behind.isdisjoint(node.all_input_nodes):
            continue
        behind.add(node)
        if node in values or Linear.match(node) is not None:
            continue
        if _chooses(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _chooses(node: fx.Node) -> bool:
    if node.target in _ALWAYS:
        return True
    return node.target in _SECOND and any(
        item is not None and item.index == 1 for item in map(Item.match, node.users)
    )
