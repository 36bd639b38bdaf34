"""Which nodes of a fake-quantized graph stand for themselves in the float model."""

from __future__ import annotations

import torch
from torch import fx

from panguq.ir.ops import encode, quantize  # noqa: F401  (register the ops matched here)
from panguq.ir.views import DequantizedWeight, Item, QuantizedInput


def float_weight(node: fx.Node) -> fx.Node | None:
    """The stored float weight behind `dequantize_weight(quantize_weight(w))`."""
    weight = DequantizedWeight.match(node)
    quantizer = None if weight is None else weight.quantizer
    return None if quantizer is None else quantizer.weight


def is_quantization(node: fx.Node) -> bool:
    """Whether this quantizes or dequantizes an activation, or takes such a quantizer's codes."""
    panguq = torch.ops.panguq
    quantizers = (
        panguq.quantize_per_tensor.default,
        panguq.quantize_per_token.default,
        panguq.quantize_per_channel.default,
        panguq.encode_per_token.default,
    )
    item = Item.match(node)
    if item is not None:
        return item.source.target in quantizers
    return node.target in quantizers or QuantizedInput.match(node) is not None
