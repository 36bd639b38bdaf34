"""What GPTQ's and AWQ's checkpoints have in common: unsigned codes with zero points, weights alone.

    value[n, k] = (code - zero) * scale        code, zero: 0 … 2^bits - 1

A symmetric code c of panguq's, from -2^(bits - 1) on, is c + 2^(bits - 1) with that zero.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panguq.artifact import Artifact
from panguq.errors import ExportError
from panguq.files.strict_json import json_text
from panguq.formats.checkpoint.folder import CONFIG, Output, marked, write_checkpoint
from panguq.formats.checkpoint.graph import CheckpointGraph, mixed_experts
from panguq.formats.checkpoint.linear import LinearForm, QuantizedLinear
from panguq.formats.checkpoint.served_files import config_of, served_files
from panguq.server_models import missing_classes
from panguq.server_releases import Server
from panguq.tensors.word_packing import WORD

logger = logging.getLogger("panguq")

LOADERS: tuple[Server, ...] = ("vllm", "transformers")


def save_weight_only(
    artifact: Artifact,
    path: str | Path,
    graph: CheckpointGraph,
    settings: Mapping[str, Any],
    parts: Callable[[QuantizedLinear], Mapping[str, Output]],
    warnings: list[str],
    overwrite: bool,
    shard_bytes: int,
) -> None:
    """Write the folder: the model's float tensors and, of each quantized linear, its `parts`.

    `settings` is config.json's quantization_config and, for older readers, quantize_config.json.
    """
    config = marked(config_of(artifact, graph.is_tied), artifact.recipe.name)
    config["quantization_config"] = dict(settings)
    warnings = [*warnings, *check_experts_alike(mixed_experts(graph))]
    for warning in (*warnings, *missing_classes(LOADERS, config)):
        logger.warning(warning)
    files = {
        CONFIG: json_text(config, sort_keys=True),
        "quantize_config.json": json_text(dict(settings), sort_keys=True),
        **served_files(artifact),
    }
    tensors = dict(_tensors(graph, parts))
    write_checkpoint(path, files, tensors, overwrite, shard_bytes=shard_bytes)


def check_experts_alike(mixed: Mapping[str, list[str]]) -> list[str]:
    """A sentence for vLLM, which makes room for all of a layer's experts by one kind: of the first
    of the layers, as published, whose experts have several, with these. Source: vLLM
    (quantization/gptq_marlin.py, awq_marlin.py)."""
    said = [
        f"vllm will not load this checkpoint: {layer} has experts' weights of several kinds "
        f"({', '.join(kinds)})"
        for layer, kinds in mixed.items()
    ]
    return said[:1]


def _tensors(
    graph: CheckpointGraph, parts: Callable[[QuantizedLinear], Mapping[str, Output]]
) -> Iterator[tuple[str, Output]]:
    for name, tensor in graph.weights.items():
        yield name, Output.of(tensor)
    for linear in graph.quantized.values():
        for leaf, output in parts(linear).items():
            yield f"{linear.path}.{leaf}", output
        if linear.bias is not None:
            yield f"{linear.path}.bias", Output.of(linear.bias)


def bits_of(linear: LinearForm) -> int:
    """Bits of a weight's code. Raises ExportError for a scheme with quantized inputs."""
    weight = linear.scheme.weight
    if weight is None or linear.scheme.activation is not None or not weight.is_integer:
        raise ExportError(
            f"{linear.path} ({linear.scheme.name}): the format holds integer weights alone, for "
            "inputs in float",
            "choose a scheme such as W4A16, or save as compressed-tensors or ascend",
        )
    return weight.bits


def group_size_of(linear: LinearForm) -> int:
    """Inputs a scale, -1 for one scale an output whatever k is."""
    weight = linear.scheme.weight
    by_group = weight is not None and weight.granularity == "per_group"
    return linear.group_size if by_group else -1


def check_whole_words(linear: LinearForm, rows: int, columns: int) -> None:
    """Raises ExportError unless n is a multiple of `rows` and k of `columns`."""
    n, k = linear.shape
    if n % rows or k % columns:
        raise ExportError(
            f"{linear.path}: a weight of {n} x {k} does not fill the format's {WORD}-bit words "
            f"(n a multiple of {rows}, k of {columns})",
            f"leave it in float: '{linear.path}': FLOAT in the recipe's schemes",
        )


def unsigned_codes(linear: QuantizedLinear) -> Tensor:
    """The weight's codes from 0 on: uint8 `[n, k]`."""
    return _unsigned(linear.codes(), bits_of(linear))


def unsigned_zeros(linear: QuantizedLinear) -> Tensor:
    """The zero points among unsigned codes: uint8 `[n, k / group_size]`."""
    zero = linear.weight_zero_point
    bits = bits_of(linear)
    if zero is None:
        n, k = linear.shape
        return torch.full((n, k // linear.group_size), 2 ** (bits - 1), dtype=torch.uint8)
    return _unsigned(zero, bits)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


def served_scale(linear: QuantizedLinear) -> Tensor:
    """The scales, `[n, k / group_size]`, in 16 bits where these hold them exactly: in the model's
    dtype, or in float16, which is what readers of a float32 model use. Otherwise as they are."""
    scale = linear.weight_scale
    half = linear.dtype if linear.dtype in (torch.float16, torch.bfloat16) else torch.float16
    cast = scale.to(half)
    return cast if torch.equal(cast.float(), scale.float()) else scale
