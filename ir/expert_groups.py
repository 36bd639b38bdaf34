"""Experts of one matmul that differ in scheme.

Up to insert-fake-quant they are one `expert_linear`, whose NodeMeta has each one's scheme; from
there on, one for each scheme, with the weights of its experts, and the sum of their results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from panguq.ir.edit import call, divide, free_name, get_tensor, label, module_path, tensor_node
from panguq.ir.node_meta import annotate, meta_of, scheme_of
from panguq.ir.quant_spec import Scheme
from panguq.ir.views import ExpertLinear
from panguq.tensors.folded_weight import materialized

aten = torch.ops.aten
panguq = torch.ops.panguq


def expert_path(path: str, expert: int) -> str:
    """The path of one expert's weight, of all experts' path: `mlp.experts.3.down_proj`."""
    owner, _, weight = path.rpartition(".")
    return f"{owner}.{expert}.{weight}".lstrip(".")


def paths_of(node: fx.Node) -> list[str]:
    """The module path of a matmul, and those of its experts' weights where it has experts."""
    path, experts = module_path(node), ExpertLinear.match(node)
    return [path, *(() if experts is None else (expert_path(path, e) for e in experts.each))]


def whole_label(node: fx.Node) -> str:
    """The label of the matmul of all experts that this one computes a part of; else its own."""
    experts = ExpertLinear.match(node)
    if experts is None or experts.members is None:
        return label(node)
    return label(node).removesuffix(f".{scheme_of(node).name}")


def give_schemes(node: fx.Node, schemes: Sequence[Scheme]) -> None:
    """Give each expert of a matmul its scheme; the matmul has that of most quantized ones."""
    quantized = [scheme for scheme in schemes if not scheme.is_float] or schemes
    ((most, _),) = Counter(quantized).most_common(1)
    each = tuple(schemes) if len(set(schemes)) > 1 else ()
    annotate(node, scheme=most, expert_schemes=each)


def schemes_of(node: fx.Node) -> dict[Scheme, tuple[int, ...]]:
    """The schemes of a matmul, each with its experts; of one that has none, its own with none."""
    each = meta_of(node).expert_schemes
    if not each:
        experts = ExpertLinear.match(node)
        return {scheme_of(node): () if experts is None else experts.each}
    found: dict[Scheme, list[int]] = {}
    for expert, scheme in enumerate(each):
        found.setdefault(scheme, []).append(expert)
    return {scheme: tuple(members) for scheme, members in found.items()}


def divide_by_scheme(gm: fx.GraphModule, node: fx.Node, empty: Callable[..., Tensor]) -> int:
    """Replace a matmul whose experts differ in scheme by one for each scheme, and their sum.

    `empty(shape, dtype)` makes room for their weights. Returns how many schemes there are.
    """
    groups = schemes_of(node)
    if len(groups) == 1:
        return 1
    linear = ExpertLinear.of(node)
    parts = []
    for scheme, members in groups.items():

        def of_members(
            stored: fx.Node | None, scheme: Scheme = scheme, members: tuple[int, ...] = members
        ) -> fx.Node | None:
            if stored is None:
                return None
            whole = materialized(get_tensor(gm, str(stored.target)))
            part = empty((len(members), *whole.shape[1:]), whole.dtype)
            for place, expert in enumerate(members):  # one after the other: all would be large
                part[place] = whole[expert]
            name = free_name(gm, f"{stored.target}_{scheme.name}")
            return tensor_node(node, name, part)

        own = (of_members(linear.weight), of_members(linear.bias))
        args = (linear.input, *own, linear.counts, list(members))
        op = panguq.expert_linear.default
        parts.append(call(node, op, args, origin=node, suffix=f".{scheme.name}"))
    total = parts[0]
    for index, part in enumerate(parts[1:], start=2):
        suffix = "" if index == len(parts) else f".sum_{index}"
        total = call(node, aten.add.Tensor, (total, part), origin=node, suffix=suffix)
    divide(node, parts, total)
    for part, scheme in zip(parts, groups, strict=True):
        annotate(part, scheme=scheme, expert_schemes=())
    return len(parts)
