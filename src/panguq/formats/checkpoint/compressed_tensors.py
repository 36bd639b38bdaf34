"""Checkpoints in the compressed-tensors format, which transformers, vLLM and vllm-ascend load.

For a quantized linear P of the source model, weight `[n, k]`, g inputs a scale:

    int-quantized (W8A8, W8A8_DYNAMIC, W4A8)
      P.weight           int8 [n, k]
      P.weight_scale     [n, 1] or [n, k / g]
      P.input_scale      float32 [1]             static activations only
      P.input_zero_point int8 [1]                static activations only
    pack-quantized (W8A16, W4A16)
      P.weight_packed    int32 [n, k * bits / 32], code + 2^(bits - 1), lowest bits first
      P.weight_scale     [n, 1] or [n, k / g]
      P.weight_shape     int64 [2]
      P.weight_zero_point  int32 [n * bits / 32, k / g], packed along n; only where there are any

Scales of 8-bit codes are float32; those of 4-bit codes, bfloat16 in panguq, have the model's dtype
where that holds them exactly. Everything else is written as the source model has it and in
its dtype: biases, norms (with what smoothing folded into them), embeddings.

A model of openPangu's is written as what it was compiled as: the Llama architecture with
`attention_bias`, which transformers and vLLM define themselves. vLLM has a class of its own for
openPangu, `PanguEmbeddedForCausalLM`; it computes the same, but transformers has none, so that no
checkpoint of that name would load there without code of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from panguq.artifact import Artifact
from panguq.files.strict_json import json_text
from panguq.formats.checkpoint.compressed_tensors_config import group_of, quantization_config
from panguq.formats.checkpoint.folder import CONFIG, SHARD_BYTES, Output, marked, write_checkpoint
from panguq.formats.checkpoint.graph import (
    CheckpointGraph,
    mixed_experts,
    read_checkpoint_graph,
)
from panguq.formats.checkpoint.linear import LinearForm, QuantizedLinear
from panguq.formats.checkpoint.loaders import check_fused, check_loaders
from panguq.formats.checkpoint.served_files import config_of, served_files
from panguq.server_models import missing_classes
from panguq.server_releases import Server
from panguq.servers import ServedFormat
from panguq.tensors.word_packing import packed_words

logger = logging.getLogger("panguq")

FORMAT: ServedFormat = "compressed-tensors"
LOADERS: tuple[Server, ...] = ("transformers", "vllm", "vllm-ascend")


def save_compressed_tensors(
    artifact: Artifact,
    path: str | Path,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the fake-quant stage of a compiled model as the folder `path`, whole or not at all.

    The folder holds config.json, safetensors (in shards of at most `shard_bytes`, with an
    index), generation_config.json and the tokenizer's files; equal models give equal bytes. Weights
    are converted one at a time. A server that will not take it, where another does, is named in
    a warning.

    Raises ExportError, saying which loader refuses what and why, for a model that no loader takes
    (weights of 3 bits, split outlier channels, GPT-2's Conv1D), or where nothing is quantized;
    StorageError for a place that is taken or
    cannot be written.
    """
    graph = read_checkpoint_graph(artifact).published()
    check_fused(graph)
    warnings = [*check_linears(graph.quantized), *check_expert_schemes(mixed_experts(graph))]
    if graph.names.divided:
        warnings.append(
            "transformers will not load this checkpoint: it knows a layer's experts as one tensor "
            "each, which has no form for codes; vLLM reads them one by one"
        )
    config = marked(_config(artifact, graph), artifact.recipe.name)
    for warning in (*warnings, *missing_classes(LOADERS, config)):
        logger.warning(warning)
    tensors = dict(_tensors(graph, artifact.dtype))
    files = {
        CONFIG: json_text(config, sort_keys=True),
        **served_files(artifact),
    }
    write_checkpoint(path, files, tensors, overwrite, shard_bytes=shard_bytes)


def check_expert_schemes(mixed: Mapping[str, list[str]]) -> list[str]:
    """A sentence for the loaders that take one scheme alone of a layer's experts: of the first of
    the layers, as published, that have several, with these."""
    said = [
        f"vllm and vllm-ascend will not load this checkpoint: the experts of {layer} have several "
        f"schemes ({', '.join(kinds)})"
        for layer, kinds in mixed.items()
    ]
    return said[:1]


def check_linears(linears: Mapping[str, LinearForm], dtype: torch.dtype | None = None) -> list[str]:
    """A sentence for each loader that will not take these linears, though another does.

    Raises ExportError if none does, or nothing is quantized. Any dtype will do.
    """
    return check_loaders(linears, FORMAT, LOADERS)


# --- tensors -----------------------------------------------------------------------------------


def _tensors(graph: CheckpointGraph, dtype: torch.dtype) -> Iterator[tuple[str, Output]]:
    for name, tensor in graph.weights.items():
        yield name, Output.of(tensor)
    for linear in graph.quantized.values():
        for leaf, output in _linear_tensors(linear, dtype).items():
            yield f"{linear.path}.{leaf}", output


def _linear_tensors(linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Output]:
    n, k = linear.shape
    group = group_of(linear)
    outputs = {"weight_scale": Output.of(_scale(linear.weight_scale, dtype))}
    if linear.bias is not None:
        outputs["bias"] = Output.of(linear.bias)
    if linear.input_scale is not None and linear.input_zero_point is not None:
        outputs["input_scale"] = Output.of(linear.input_scale)
        outputs["input_zero_point"] = Output.of(linear.input_zero_point.to(torch.int8))
    if group.format == "int-quantized":
        outputs["weight"] = Output(torch.int8, (n, k), linear.codes)
        return outputs
    words = -(-k * group.bits // 32)
    outputs["weight_packed"] = Output(torch.int32, (n, words), partial(packed, linear.stored))
    outputs["weight_shape"] = Output.of(torch.tensor([n, k]))
    if linear.weight_zero_point is not None:
        shape = (-(-n * group.bits // 32), linear.weight_zero_point.shape[1])
        zeros = partial(packed_zero_points, linear.weight_zero_point, group.bits)
        outputs["weight_zero_point"] = Output(torch.int32, shape, zeros)
    return outputs


def packed(stored: Tensor) -> Tensor:
    """Stored codes as pack-quantized has them, int32 `[n, ceil(k * bits / 32)]`.

    stored: int8 `[n, k]`, or uint8 `[n, k / 2]` with two 4-bit codes a byte, low nibble first. Both
    are in order already: only the sign bit turns over, which makes code + 2^(bits - 1) of two's
    complement. A last word that is not full ends in zeros.
    """
    flipped = stored.view(torch.uint8) ^ (0x88 if stored.dtype == torch.uint8 else 0x80)
    return functional.pad(flipped, (0, -flipped.shape[1] % 4)).view(torch.int32)


def packed_zero_points(zeros: Tensor, bits: int) -> Tensor:
    """int8 `[n, groups]` as pack-quantized has them, int32 `[ceil(n * bits / 32), groups]`."""
    count = 32 // bits
    padded = functional.pad(zeros, (0, 0, 0, -zeros.shape[0] % count))
    unsigned = padded.to(torch.int16) + 2 ** (bits - 1)
    if padded.shape[0] != zeros.shape[0]:
        unsigned[zeros.shape[0] :] = 0
    return packed_words(unsigned.T.contiguous(), bits).T.contiguous()


def _scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """4-bit scales in the model's dtype if they are exact there."""
    if scale.dtype == torch.float32:
        return scale
    cast = scale.to(dtype)
    return cast if torch.equal(cast.float(), scale.float()) else scale


# --- configuration -----------------------------------------------------------------------------


def _config(artifact: Artifact, graph: CheckpointGraph) -> dict[str, Any]:
    data = config_of(artifact, graph.is_tied)
    quantized = list(graph.quantized.values())
    data["quantization_config"] = quantization_config(
        quantized, graph.float_linears, graph.names.module_in_memory
    )
    return data
