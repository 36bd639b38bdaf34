"""Checkpoints in AWQ's format (AutoAWQ's GEMM layout), for transformers, vLLM, SGLang and lmdeploy.

For a quantized linear P, weight `[n, k]` of 4 bits, g inputs a scale:

    P.qweight  int32 [k, n / 8]       codes from 0 on, outputs 0 2 4 6 1 3 5 7 of eight in a word
    P.qzeros   int32 [k / g, n / 8]   zero points, likewise
    P.scales   [k / g, n]             16 bits where these hold them, else float32

One group size for the whole model: where linears differ, the scales of larger groups are repeated
until all have the same, which changes no value. Source: AutoAWQ's packing as GPTQModel
(quantization/awq/utils) and vLLM (quantization/awq.py) read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panguq.artifact import Artifact
from panguq.errors import ExportError
from panguq.formats.checkpoint.folder import SHARD_BYTES, Output
from panguq.formats.checkpoint.graph import read_checkpoint_graph
from panguq.formats.checkpoint.linear import LinearForm, QuantizedLinear
from panguq.formats.checkpoint.loaders import check_fused, check_loaders
from panguq.formats.checkpoint.weight_only import (
    LOADERS,
    bits_of,
    check_whole_words,
    group_size_of,
    save_weight_only,
    served_scale,
    unsigned_codes,
    unsigned_zeros,
)
from panguq.servers import ServedFormat
from panguq.tensors.word_packing import awq_words

FORMAT: ServedFormat = "awq"
_BITS = 4
_A_WORD = 8
_SMALLEST = 32


def save_awq(
    artifact: Artifact,
    path: str | Path,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the fake-quant stage of a compiled model as the folder `path`, whole or not at all.

    A reader that will not take it, where another does, is named in a warning. Raises ExportError
    for what the format cannot hold: other weights than of 4 bits, quantized inputs, split
    channels; StorageError for a place that is taken or cannot be written.
    """
    graph = read_checkpoint_graph(artifact).published()
    check_fused(graph)
    warnings = check_linears(graph.quantized)
    group_size = _common_group(graph.quantized.values())
    settings = _quantization_config(group_size, graph.float_linears)
    parts = partial(_linear_parts, group_size=group_size)
    save_weight_only(artifact, path, graph, settings, parts, warnings, overwrite, shard_bytes)


def check_linears(linears: Mapping[str, LinearForm], dtype: torch.dtype | None = None) -> list[str]:
    """A sentence for each loader that will not take these linears, though another does.

    Raises ExportError if none does, or the format cannot hold them. Any dtype will do.
    """
    for linear in linears.values():
        if bits_of(linear) != _BITS:
            raise ExportError(
                f"{linear.path} ({linear.scheme.name}): the format has codes of {_BITS} bits alone",
                "choose W4A16 in the recipe, or save as gptq",
            )
        check_whole_words(linear, _A_WORD, 1)
    if linears and 0 < _common_group(linears.values()) < _SMALLEST:
        raise ExportError(
            f"the format has one group size for the whole model, and no multiple of {_SMALLEST} "
            f"divides {', '.join(map(str, sorted(_sizes(linears.values()))))}",
            "choose group sizes that are multiples of 32, or save as gptq",
        )
    return check_loaders(linears, FORMAT, LOADERS)


def _linear_parts(linear: QuantizedLinear, group_size: int) -> dict[str, Output]:
    """The tensors of one linear, its bias excluded."""
    n, k = linear.shape
    again = 1 if group_size == -1 else linear.group_size // group_size
    groups = k // linear.group_size * again
    scale = served_scale(linear)
    return {
        "qweight": Output(torch.int32, (k, n // _A_WORD), partial(_qweight, linear)),
        "qzeros": Output(torch.int32, (groups, n // _A_WORD), partial(_qzeros, linear, again)),
        "scales": Output(scale.dtype, (groups, n), lambda: _by_group(scale, again)),
    }


def _qweight(linear: QuantizedLinear) -> Tensor:
    return awq_words(unsigned_codes(linear).T.contiguous())


def _qzeros(linear: QuantizedLinear, again: int) -> Tensor:
    return awq_words(_by_group(unsigned_zeros(linear), again))


def _by_group(values: Tensor, again: int) -> Tensor:
    """`[n, groups]` as `[groups * again, n]`."""
    return values.T.repeat_interleave(again, dim=0)


def _quantization_config(group_size: int, float_linears: Iterable[str]) -> dict[str, Any]:
    """The config. Readers always subtract zero points."""
    return {
        "quant_method": FORMAT,
        "bits": _BITS,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(float_linears),
    }


def _common_group(linears: Iterable[LinearForm]) -> int:
    """The largest size that divides all groups; -1 where every linear has one scale an output."""
    linears = list(linears)
    if all(group_size_of(linear) == -1 for linear in linears):
        return -1
    return math.gcd(*_sizes(linears))


def _sizes(linears: Iterable[LinearForm]) -> set[int]:
    return {linear.group_size for linear in linears}
