"""How many calibration tokens each expert gets, and who then sees all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx

from panguq.ir.call_arguments import operand
from panguq.ir.edit import label, module_path
from panguq.ir.expert_groups import whole_label
from panguq.ir.run.reroute import Reroute, routing_of
from panguq.ir.run.sweep import AllTokens, sweep
from panguq.ir.views import ExpertLinear, Linear
from panguq.passes.pipeline.base import ExpertTokens, PassContext, Table
from panguq.ranks import ranks
from panguq.tensors.work_folder import Finished

FEW_TOKENS = 128
"""An expert with fewer is calibrated on all tokens, unless the recipe says another number."""


def count_tokens(
    gm: fx.GraphModule, ctx: PassContext, matmuls: Iterable[fx.Node], least: int
) -> dict[fx.Node, ExpertTokens]:
    """What each expert linear among `matmuls` gets; also kept in `ctx.expert_tokens`.

    One sweep of its own.
    """
    experts = [node for node in matmuls if ExpertLinear.match(node) is not None]
    counts = {ExpertLinear.of(node).counts for node in experts}
    if not experts:
        return {}

    def compute() -> Finished:
        totals: dict[fx.Node, Tensor] = {}

        def add(node: fx.Node, value: Tensor) -> None:
            totals[node] = totals.get(node, torch.zeros_like(value)) + value

        sweep(gm, ranks().share(ctx.batches), counts, add, ctx.progress)
        ranks().add_up(list(totals.values()))
        return Finished({label(node): total for node, total in totals.items()})

    seen = ctx.together("tokens of experts", compute).tensors
    found = {
        node: ExpertTokens(seen[label(ExpertLinear.of(node).counts)], least) for node in experts
    }
    ctx.expert_tokens.update({whole_label(node): tokens for node, tokens in found.items()})
    return found


def reroutes(
    tokens: Mapping[fx.Node, ExpertTokens], observe: Callable[[int, fx.Node, Tensor], None]
) -> list[AllTokens]:
    """One for each routing that leaves experts underfed."""
    values: dict[fx.Node, dict[fx.Node, None]] = defaultdict(dict)
    experts: dict[fx.Node, tuple[int, ...]] = {}
    for node, seen in tokens.items():
        values[routing_of(node)][Linear.of(node).input] = None
        experts[routing_of(node)] = seen.underfed
    return [
        AllTokens(Reroute(routing, tuple(read)), experts[routing], observe)
        for routing, read in values.items()
        if experts[routing]
    ]


def tokens_table(tokens: Mapping[fx.Node, ExpertTokens]) -> Table:
    """Each layer's experts: the least, median and most tokens, and who saw all of them."""
    rows = []
    for node, seen in tokens.items():
        routed = seen.routed
        spread = (int(routed.min()), int(routed.median()), int(routed.max()))
        listed = " ".join(map(str, seen.underfed))
        rows.append((module_path(node), len(routed), *spread, len(seen.underfed), listed))
    columns = ("matmul", "experts", "least", "median", "most", "on_all_tokens", "which")
    return Table(columns, tuple(rows))


def routing_values(gm: fx.GraphModule) -> set[fx.Node]:
    """The weights that routers give experts, which must be finite."""
    combine = torch.ops.panguq.combine_experts.default
    return {operand(node, 2) for node in gm.graph.nodes if node.target is combine}
