"""Fused attention of a lowered graph as the calls that were timed: heads with keys of their own, or
latents that all heads share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, fx

from panguq.ir.call_arguments import arguments
from panguq.kernels.ascend.own.latent_attention import absorbed_sizes, expanded_sizes
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.call import SizesOf, VendorCall, value_of
from panguq.lowering.ascend.op_times.node_matmuls import multiplied
from panguq.lowering.ascend.op_times.price import price, summed
from panguq.lowering.target import Cost
from panguq.tensors.dtypes import dtype_name


def attention_cost(node: fx.Node, name: str, sizes: SizesOf, machine: AscendMachine) -> Cost:
    """`npu_fused_infer_attention_score` in layout BNSD, without rotary parts of their own.

    A mask that is given hides what comes later, as far as there is anything later.
    """
    given = arguments(node)
    values = [cast(Tensor, value_of(given[part])) for part in ("query", "key", "value")]
    shapes = [_of_tokens(sizes(value)) for value in values]
    queries = shapes[0][1]
    attrs = {"is_causal": given["atten_mask"] is not None and queries > 1}
    return price(VendorCall("gqa", tuple(shapes), _kinds(values[0], 3), attrs), machine)


def latent_cost(node: fx.Node, name: str, sizes: SizesOf, machine: AscendMachine) -> Cost:
    """Latent attention in the form that multiplies less for these sizes, its matmuls of
    `kv_b_proj` included; panguq's own op and the canonical one alike."""
    given = {key: value_of(value) for key, value in arguments(node).items()}
    query, rope, latent, weight = (
        cast(Tensor, given[key]) for key in ("query_nope", "query_rope", "latent", "weight")
    )
    batch, heads, seq, nope = sizes(query)
    total, rank = sizes(latent)[2:]
    turned, value = sizes(rope)[-1], sizes(weight)[0] // heads - nope
    expanded = total * (nope + value) * rank + seq * total * (nope + turned + value)
    absorbed = seq * (nope + value) * rank + seq * total * (2 * rank + turned)
    attrs: dict[str, Any] = {"is_causal": seq > 1}
    if absorbed < expanded:
        form = absorbed_sizes(heads, rank, turned)
        made = batch * seq * heads * (nope + value) * rank
        if form.apart:
            parts = ((form.heads, rank), (form.heads, turned), (1, rank), (1, turned), (1, rank))
            tokens = (seq, seq, total, total, total)
            shapes = tuple((batch, t, *part) for t, part in zip(tokens, parts, strict=True))
            call = VendorCall("mla", shapes, _kinds(query, 5), {**attrs, "inputLayout": "BSND"})
        else:
            call = _heads(batch, (seq, total), (heads, 1), form.head, query, attrs)
    else:
        made = batch * total * heads * (nope + value) * rank
        form = expanded_sizes(heads, nope, turned, value)
        width = form.head + (turned if form.apart else 0)
        call = _heads(batch, (seq, total), (heads, heads), width, query, attrs)
    cube = multiplied(made, machine)
    return summed([price(call, machine), Cost(cube, {"cube": cube})])


def _heads(
    batch: int,
    tokens: tuple[int, int],
    heads: tuple[int, int],
    width: int,
    like: Tensor,
    attrs: Mapping[str, Any],
) -> VendorCall:
    (seq, total), (query_heads, key_heads) = tokens, heads
    shapes = (
        (batch, seq, query_heads, width),
        (batch, total, key_heads, width),
        (batch, total, key_heads, width),
    )
    return VendorCall("gqa", shapes, _kinds(like, 3), attrs)


def _of_tokens(shape: Any) -> tuple[int, ...]:
    """`[b, n, s, d]` as `[b, s, n, d]`."""
    batch, heads, tokens, width = shape
    return batch, tokens, heads, width


def _kinds(like: Tensor, count: int) -> tuple[str, ...]:
    return (dtype_name(like.dtype),) * count
