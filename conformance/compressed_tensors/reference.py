"""What panguq computes for a checkpoint, in a file that needs no panguq to be compared with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from panguq.evaluation import evaluate, logits_of
from panguq.formats.checkpoint.graph import read_checkpoint_graph
from panguq.formats.checkpoint.linear import QuantizedLinear

panguq = torch.ops.panguq
TOKENS = 8


def write_reference(compiled: Any, ids: Tensor, path: Path) -> None:
    """For every quantized linear P: a random input `P.x` `[8, k]`, that input quantized `P.xq`, and
    the output `[8, n]`, all in float32; and the perplexity of the fake-quant model over the windows
    `ids` `[windows, tokens]`.

    The weight is codes times scales: `exact` in float32, and `rounded` to the model's dtype, as
    panguq and loaders that compute in that dtype have it. Of either there is the sha256 of its
    float32 values and the output, `P.exact` and `P.rounded`.
    """
    graph = read_checkpoint_graph(compiled.artifact)
    generator = torch.Generator().manual_seed(0)
    tensors = {"ids": ids}
    digests: dict[str, dict[str, str]] = {}
    kinds: dict[str, str] = {}
    for name, linear in graph.quantized.items():
        kinds[name] = _kind(linear)
        x = torch.randn(TOKENS, linear.shape[1], generator=generator)
        if linear.input_scale is not None:
            x *= 40 * linear.input_scale  # some of it is clipped
        xq = _quantized(linear, x)
        bias = None if linear.bias is None else linear.bias.float()
        tensors |= {f"{name}.x": x, f"{name}.xq": xq}
        digests[name] = {}
        for kind, dtype in (("exact", torch.float32), ("rounded", linear.dtype)):
            weight = linear.dequantized(dtype).float()
            digests[name][kind] = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
            tensors[f"{name}.{kind}"] = torch.nn.functional.linear(xq, weight, bias)
    figures = evaluate({"fake-quant": logits_of(compiled.at_stage("fake-quant"))}, ids)
    perplexity = figures["fake-quant"]["perplexity"]
    notes = {"digests": digests, "kinds": kinds, "perplexity": perplexity}
    save_file(tensors, path, metadata={"reference": json.dumps(notes)})


def _kind(linear: QuantizedLinear) -> str:
    if linear.scheme.activation is None:
        return "float"
    return "static" if linear.input_scale is not None else "dynamic"


def _quantized(linear: QuantizedLinear, x: Tensor) -> Tensor:
    """The input as panguq's graph rounds it."""
    spec = linear.scheme.activation
    if spec is None:
        return x.clone()  # a file holds no two tensors in one memory
    if linear.input_scale is None:
        codes, scale = panguq.quantize_per_token(x, spec.quant_max)
        return panguq.dequantize(codes, scale, None, torch.float32)
    scale, zero = linear.input_scale, linear.input_zero_point
    codes = panguq.quantize_per_tensor(x, scale, zero, spec.quant_min, spec.quant_max)
    return panguq.dequantize(codes, scale, zero, torch.float32)
