"""Let a graph write into the cache instead of returning a longer copy of it."""

from __future__ import annotations

import operator

import torch
from torch import fx

from panguq.ir.call_arguments import arguments
from panguq.ir.edit import erase_unused
from panguq.ir.interface import Interface
from panguq.ir.ops import latent_attention, quantize  # noqa: F401  (registers their ops)
from panguq.ir.views import results_of
from panguq.kernels.cpu.bfloat16_float import bfloat16_attention

aten = torch.ops.aten
PAST_LENGTH = "past_length"
TOKENS = 2
# What reads a part of a longer tensor as well as a tensor of its own.
_READERS = (
    aten.sym_size.int,
    aten.linear.default,
    torch.ops.panguq.attention.default,
    bfloat16_attention,
    torch.ops.panguq.latent_attention.default,
    torch.ops.panguq.dequantize.default,
)


_WRITTEN = "written_into"


def written_into(gm: fx.GraphModule) -> frozenset[str]:
    """The names of the inputs of a graph that are memory, which it writes into."""
    return gm.meta.get(_WRITTEN, frozenset())


def write_into_cache(gm: fx.GraphModule, interface: Interface) -> None:
    """Before: `grown = cat(past, new)` over tokens, a copy of the whole past, is read and returned.

    After: the input `past` is memory `[batch, heads, capacity, d]`, of which the first
    `past_length` tokens are the past; that number is one more input, the last. The graph writes
    `new` behind them, and `grown` is the memory's first `past_length + new` tokens:

        end = past_length + new.shape[2]
        memory[:, :, past_length:end].copy_(new);  grown = memory[:, :, :end]

    The caller sees to it that the capacity is at least `end`. Other inputs are taken as they were:
    states, what grows in another way, and what an op reads that wants a tensor of its own, as the
    vendor's attention does.
    """
    found = _growing(gm, interface)
    if not found:
        return
    graph = gm.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        length = graph.placeholder(PAST_LENGTH)
    for past, grown in found:
        new = arguments(grown)["tensors"][1]
        with graph.inserting_before(grown):
            count = graph.call_function(aten.sym_size.int, (new, TOKENS))
            end = graph.call_function(operator.add, (length, count))
            place = graph.call_function(aten.slice.Tensor, (past, TOKENS, length, end))
            graph.call_function(aten.copy_.default, (place, new))
            view = graph.call_function(aten.slice.Tensor, (past, TOKENS, 0, end))
        view.meta = dict(grown.meta)
        grown.replace_all_uses_with(view)
        erase_unused([grown])
        for size in [user for user in past.users if user.target is aten.sym_size.int]:
            if arguments(size)["dim"] % 4 == TOKENS:
                size.replace_all_uses_with(length)
                erase_unused([size])
    gm.meta[_WRITTEN] = frozenset(str(past.target) for past, _ in found)


def _growing(gm: fx.GraphModule, interface: Interface) -> list[tuple[fx.Node, fx.Node]]:
    """The inputs that hold the past and what continues them, where that is `cat(past, new)`,
    nothing else reads the past, and all that reads the result reads a part of a tensor."""
    inputs = {str(node.target): node for node in gm.graph.nodes if node.op == "placeholder"}
    results = results_of(gm)
    found = []
    for name, output in interface.cache_pairs().items():
        past, grown = inputs[name], results[interface.outputs.index(output)]
        if grown.target is not aten.cat.default:
            continue
        given = arguments(grown)
        parts = given["tensors"]
        if len(parts) != 2 or parts[0] is not past or given["dim"] not in (TOKENS, TOKENS - 4):
            continue
        alone = all(user is grown or user.target is aten.sym_size.int for user in past.users)
        readers = [user for user in grown.users if user.op != "output"]
        if alone and all(user.target in _READERS for user in readers):
            found.append((past, grown))
    return found
