"""Checkpoints in GPTQ's format, which GPTQModel, transformers, vLLM and SGLang load.

For a quantized linear P, weight `[n, k]`, g inputs a scale, codes of 2, 3, 4 or 8 bits from 0 on:

    P.qweight  int32 [k * bits / 32, n]       codes, packed along k, lowest bits first
    P.qzeros   int32 [k / g, n * bits / 32]   zero points, packed along n
    P.scales   [k / g, n]                     16 bits where these hold them, else float32
    P.g_idx    int32 [k]                      the scale of each input

There are two conventions. `gptq` stores zero - 1, which has no room for a zero point of 0; readers
add 1 again. `gptq_v2` stores the zero point itself. Symmetric weights are written by the first,
which all readers know; those with zero points by the second, since GPTQModel, and with it
transformers, takes them by the first from nobody but itself. Source: GPTQModel
(nn_modules/qlinear, utils/model.py) and vLLM (quantization/gptq.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

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
from panguq.servers import FUSED, ServedFormat
from panguq.tensors.word_packing import WORD, packed_words

FORMAT: ServedFormat = "gptq"
BITS = (2, 3, 4, 8)
MINUS_ONE, AS_THEY_ARE = "gptq", "gptq_v2"

_Kind: TypeAlias = tuple[int, int, bool]
"""Bits, inputs a scale (-1: all), symmetric."""


def save_gptq(
    artifact: Artifact,
    path: str | Path,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the fake-quant stage of a compiled model as the folder `path`, whole or not at all.

    A reader that will not take it, where another does, is named in a warning. Raises ExportError
    for what the format cannot hold: quantized inputs, split channels, weights that do not fill
    its words; StorageError for a place that is taken or cannot be written.
    """
    graph = read_checkpoint_graph(artifact).published()
    check_fused(graph)
    linears = graph.quantized
    warnings = check_linears(linears)
    has_zeros = any(linear.has_zero_point for linear in linears.values())
    convention = AS_THEY_ARE if has_zeros else MINUS_ONE
    settings = _quantization_config(linears.values(), graph.float_linears, convention)
    if settings["dynamic"].keys() - {_rule("-", "lm_head")}:
        warnings.append(
            "transformers will not load this checkpoint: it gives all linears of the layers one "
            "kind and knows no `dynamic` rules; vLLM and GPTQModel do"
        )
    parts = partial(_linear_parts, convention=convention)
    save_weight_only(artifact, path, graph, settings, parts, warnings, overwrite, shard_bytes)


def check_linears(linears: Mapping[str, LinearForm], dtype: torch.dtype | None = None) -> list[str]:
    """A sentence for each loader that will not take these linears, though another does.

    Raises ExportError if none does, or the format cannot hold them. Any dtype will do.
    """
    for linear in linears.values():
        bits = bits_of(linear)
        if bits not in BITS:
            raise ExportError(
                f"{linear.path} ({linear.scheme.name}): the format has codes of "
                f"{', '.join(map(str, BITS[:-1]))} and {BITS[-1]} bits",
                "choose one of these in the recipe",
            )
        whole = WORD if bits == 3 else WORD // bits
        check_whole_words(linear, whole, whole)
    return check_loaders(linears, FORMAT, LOADERS)


def _linear_parts(linear: QuantizedLinear, convention: str) -> dict[str, Output]:
    """The tensors of one linear, its bias excluded."""
    n, k = linear.shape
    bits, groups = bits_of(linear), k // linear.group_size
    scale = served_scale(linear)
    return {
        "qweight": Output(torch.int32, (k * bits // WORD, n), partial(_qweight, linear)),
        "qzeros": Output(
            torch.int32, (groups, n * bits // WORD), partial(_qzeros, linear, convention)
        ),
        "scales": Output(scale.dtype, (groups, n), lambda: scale.T.contiguous()),
        "g_idx": Output.of(torch.arange(k, dtype=torch.int32) // linear.group_size),
    }


def _qweight(linear: QuantizedLinear) -> Tensor:
    return packed_words(unsigned_codes(linear), bits_of(linear)).T.contiguous()


def _qzeros(linear: QuantizedLinear, convention: str) -> Tensor:
    zeros = unsigned_zeros(linear) - (1 if convention == MINUS_ONE else 0)
    return packed_words(zeros.T.contiguous(), bits_of(linear))


# --- configuration -----------------------------------------------------------------------------


def _quantization_config(
    linears: Iterable[LinearForm], float_linears: Iterable[str], convention: str
) -> dict[str, Any]:
    """The config: the kind that most linears have, and a rule for each that has another or none.

    A rule names a linear by a pattern, `-:` for those in float, `+:` with what differs. Servers
    join linears and look for the joint name, so that it is in the pattern, too.
    """
    kinds = {linear.path: _kind(linear) for linear in linears}
    (base, _), *_ = Counter(kinds.values()).most_common(1)
    dynamic: dict[str, dict[str, Any]] = {_rule("-", path): {} for path in float_linears}
    for path, kind in kinds.items():
        if kind != base:
            dynamic[_rule("+", path)] = _settings(kind)
    return {
        "quant_method": FORMAT,
        **_settings(base),
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": convention,
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": [f"panguq:{version('panguq')}"]},
    }


def _kind(linear: LinearForm) -> _Kind:
    return bits_of(linear), group_size_of(linear), not linear.has_zero_point


def _settings(kind: _Kind) -> dict[str, Any]:
    bits, group_size, symmetric = kind
    return {"bits": bits, "group_size": group_size, "sym": symmetric}


def _rule(sign: str, path: str) -> str:
    owner, _, leaf = path.rpartition(".")
    names = [leaf, *(whole for whole, parts in FUSED.items() if leaf in parts)]
    prefix = re.escape(f"{owner}.") if owner else ""
    listed = "|".join(map(re.escape, names))
    return f"{sign}:^{prefix}{f'({listed})' if len(names) > 1 else listed}$"
