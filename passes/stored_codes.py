"""How a weight that is computed from a float one becomes codes read from storage."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from panguq.ir.edit import call, erase_unused, replace, tensor_node
from panguq.ir.weight_store import WeightStore
from panguq.kernels import packing  # noqa: F401  (registers the packing ops)

panguq = torch.ops.panguq


def store_codes(node: fx.Node, store: WeightStore, codes: Tensor, bits: int) -> None:
    """Replace `quantize_weight(w, ...)` by stored `codes` int8 `[n, k]`; drops w if none reads it.

    8 bits: int8 as it is. 4 bits: `unpack_int4` of two codes a byte. Else: `unpack_codes`.
    """
    weight, scale = node.args[:2]
    name = str(scale.target).removesuffix("_scale") + "_codes"
    k = codes.shape[1]
    if bits == 8:
        replacement = tensor_node(node, name, store.put(codes))
    elif bits == 4:
        packed = tensor_node(node, name, store.put(panguq.pack_int4(codes)))
        replacement = _unpacked(node, panguq.unpack_int4.default, (packed,))
    else:
        packed = tensor_node(node, name, store.put(panguq.pack_codes(codes, bits)))
        replacement = _unpacked(node, panguq.unpack_codes.default, (packed, bits, k))
    replace(node, replacement)
    erase_unused([weight])


def _unpacked(node: fx.Node, op: torch._ops.OpOverload, args: tuple[object, ...]) -> fx.Node:
    return call(node, op, args, origin=node, suffix=".unpacked")
