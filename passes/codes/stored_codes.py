"""How a weight that is computed from a float one becomes codes read from storage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from panguq.ir.edit import call, erase_unused, replace, set_tensor, tensor_node
from panguq.ir.ops import packing  # noqa: F401  (registers the packing ops)
from panguq.ir.views import QuantizedWeight
from panguq.tensors.weight_store import WeightStore

panguq = torch.ops.panguq


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes `[n, k]` as they are stored; see `store_codes`."""
    if bits == 8:
        return codes
    packed: Tensor = panguq.pack_int4(codes) if bits == 4 else panguq.pack_codes(codes, bits)
    return packed


def stem_of(node: fx.Node) -> str:
    """The common beginning of the names of all tensors stored for `node`, a `quantize_weight`."""
    return str(QuantizedWeight.of(node).scale.target).removesuffix("_scale")


def codes_name(node: fx.Node) -> str:
    """The name of the stored codes of `node`, a `quantize_weight`."""
    return f"{stem_of(node)}_codes"


def set_grid(
    gm: fx.GraphModule,
    node: fx.Node,
    put: Callable[[Tensor], Tensor],
    scale: Tensor,
    zero_point: Tensor | None,
) -> None:
    """Store what `put` gives for another scale and zero point of `node`, a `quantize_weight`."""
    quantizer = QuantizedWeight.of(node)
    set_tensor(gm, str(quantizer.scale.target), put(scale))
    if quantizer.zero_point is not None and zero_point is not None:
        set_tensor(gm, str(quantizer.zero_point.target), put(zero_point))


def store_codes(node: fx.Node, store: WeightStore, codes: Tensor, bits: int) -> None:
    """Replace `quantize_weight(w, ...)` by stored `codes` `[n, k]`; drops w if none reads it.

    8 bits: as they are. 4 bits, int8: `unpack_int4` of two codes a byte. Else: `unpack_codes`.
    """
    read_packed(node, store.put(packed_codes(codes, bits)), bits)


def read_packed(node: fx.Node, packed: Tensor, bits: int) -> None:
    """As `store_codes`, with codes that are packed and stored already."""
    weight = QuantizedWeight.of(node).weight
    k = int(weight.meta["val"].shape[-1])
    replacement = tensor_node(node, codes_name(node), packed)
    if bits == 4:
        replacement = _unpacked(node, panguq.unpack_int4.default, (replacement,))
    elif bits != 8:
        replacement = _unpacked(node, panguq.unpack_codes.default, (replacement, bits, k))
    replace(node, replacement)
    erase_unused([weight])


def _unpacked(node: fx.Node, op: torch._ops.OpOverload, args: tuple[object, ...]) -> fx.Node:
    return call(node, op, args, origin=node, suffix=".unpacked")
