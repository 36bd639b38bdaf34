"""A compiled model as a checkpoint in msModelSlim's AscendV1 format, for vllm-ascend and MindIE.

    quant_model_description.json         the type of every tensor: FLOAT, W8A8, …
    quant_model_weights.safetensors      or -0000x-of-0000y with an index
    config.json, generation_config.json  of the source model
    tokenizer.json …                     if the model has a tokenizer

What neither server has a kernel for is refused before anything is written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from panguq.artifact import Artifact
from panguq.errors import ExportError
from panguq.files.strict_json import json_text
from panguq.formats.checkpoint.ascend_v1_tensors import (
    FLAT,
    FLOAT,
    SLICES,
    TYPES,
    Entry,
    float_entry,
    linear_entries,
    loader_split,
    scheme_name,
)
from panguq.formats.checkpoint.folder import SHARD_BYTES, marked, write_checkpoint
from panguq.formats.checkpoint.graph import (
    CheckpointGraph,
    mixed_experts,
    read_checkpoint_graph,
)
from panguq.formats.checkpoint.linear import LinearForm
from panguq.formats.checkpoint.served_files import config_of, served_files
from panguq.kernels.ascend.limits import CODES_PER_WORD, W4A8_GROUP
from panguq.server_models import missing_classes
from panguq.server_releases import Server
from panguq.servers import support, too_large

logger = logging.getLogger("panguq")

DESCRIPTION = "quant_model_description.json"
STEM = "quant_model_weights"
FORMAT_VERSION = "1.0.0"
READERS: tuple[Server, ...] = ("vllm-ascend", "mindie", "sglang")
_BY_PRECISION = ("W8A16", "W8A8_DYNAMIC", "W8A8", "W4A8_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC")
"""The last one present names the model as a whole, as msModelSlim has it."""


def save_ascend_v1(
    artifact: Artifact,
    path: str | Path,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a compiled model as the folder `path`, whole or not at all, one tensor at a time.

    Raises ExportError, naming the matmul, the server and the reason, for what no server takes:
    schemes without a kernel, weights with zero points, matmuls that were split, float32 models
    (NPU kernels take only float16 and bfloat16, and scales are rounded to the model's dtype when
    it is compiled). Raises StorageError if there is something at `path` already (unless `overwrite`
    and panguq wrote it), or if it cannot be written.
    """
    graph = read_checkpoint_graph(artifact).published()
    _refuse_mixed(graph)
    config = marked(config_of(artifact, graph.is_tied), artifact.recipe.name)
    warnings = check_linears(graph.quantized, artifact.dtype)
    for warning in (*warnings, *missing_classes(READERS, config)):
        logger.warning(warning)
    entries = list(checkpoint_entries(graph))
    files: dict[str, bytes | str] = {
        DESCRIPTION: json_text(description(entries)),
        "config.json": json_text(config),
        **served_files(artifact),
    }
    tensors = {entry.name: entry.output for entry in entries if entry.name not in graph.tied}
    write_checkpoint(path, files, tensors, overwrite, STEM, shard_bytes)


def checkpoint_entries(graph: CheckpointGraph) -> Iterator[Entry]:
    """Every tensor of the checkpoint, and a tied LM head, which is described, since loaders look
    its type up, and not written: with `tie_word_embeddings` they take the embedding."""
    for name, tensor in graph.weights.items():
        yield float_entry(name, tensor)
    for name, first in graph.tied.items():
        yield float_entry(name, graph.weights[first])
    for linear in graph.quantized.values():
        yield from linear_entries(linear)


def description(entries: list[Entry]) -> dict[str, Any]:
    """`quant_model_description.json`: what the model is, and the type of every tensor."""
    types = {entry.type for entry in entries}
    present = [kind for kind in _BY_PRECISION if kind in types]
    has_groups = any(entry.name.endswith(".weight_scale_second") for entry in entries)
    return {
        "model_quant_type": present[-1] if present else FLOAT,
        "version": FORMAT_VERSION,
        "group_size": W4A8_GROUP if has_groups else 0,
        "metadata": {},
        "optional": {},
        **{entry.name: entry.type for entry in sorted(entries, key=lambda entry: entry.name)},
    }


# --- what is refused ----------------------------------------------------------------------------


def check_linears(linears: Mapping[str, LinearForm], dtype: torch.dtype) -> list[str]:
    """A sentence for each server that will not take these linears, by path, though another does.

    Raises ExportError if no server takes them all, or none a model of this dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ExportError(
            f"the model computes in {str(dtype).removeprefix('torch.')}, and the NPU kernels that "
            f"{' and '.join(READERS)} call take float16 and bfloat16 alone",
            "compile it with dtype=torch.bfloat16 (--dtype bfloat16)",
        )
    refused: dict[Server, dict[str, str]] = {}
    for server in READERS:
        reasons = {path: _refusal(linear, server) for path, linear in linears.items()}
        refused[server] = {path: why for path, why in reasons.items() if why}
    told = {
        server: f"{next(iter(reasons.values()))} ({next(iter(reasons))}, {len(reasons)} in all)"
        for server, reasons in refused.items()
        if reasons
    }
    if all(refused.values()):
        listed = "; ".join(f"{server}: {why}" for server, why in told.items())
        first = next(iter(refused[READERS[0]]))
        raise ExportError(
            f"no server of this format takes the model. {listed}", _instead(linears[first])
        )
    return [f"{server} will not take this checkpoint: {why}" for server, why in told.items()]


def _refusal(linear: LinearForm, server: Server) -> str:
    """Why the server would not take it; empty if it would."""
    n, k = linear.shape
    name = scheme_name(linear)
    per_channel = linear.group_size == k
    grouped = None if per_channel else linear.group_size
    entry = support(server, "ascend", name, grouped, linear.is_expert, has_bias=linear.has_bias)
    if not entry.takes:
        return entry.reason
    if linear.has_zero_point:
        return "it takes weights without zero points"
    if name == "W4A8" and linear.is_expert and per_channel:
        return f"it wants k % {SLICES} == 0 and n % 2 == 0" if k % SLICES or n % 2 else ""
    if name == "W4A8" and (k % W4A8_GROUP or n % 2):
        return f"its int8 x int4 kernel wants k % {W4A8_GROUP} == 0 and n % 2 == 0, not {n} x {k}"
    if name == FLAT and (reason := _flat_refusal(linear)):
        return reason
    if name not in TYPES:
        return "the format has no such type"
    return too_large(server, name, n, k)


def _flat_refusal(linear: LinearForm) -> str:
    """Why a linear behind a Kronecker product does not fit its loader; empty if it does."""
    n, k = linear.shape
    if n % CODES_PER_WORD or k % CODES_PER_WORD:
        return f"it packs 4-bit codes by eights, and the weight is {n} x {k}"
    wanted = loader_split(k)
    if linear.split != wanted:
        a, b = linear.split or (1, k)
        return f"it splits {k} inputs into {wanted and '{} x {}'.format(*wanted)}, not {a} x {b}"
    return ""


def _instead(linear: LinearForm) -> str:
    """What to choose, of the servers' advice the first; for a shape, what takes any."""
    name = scheme_name(linear)
    advice = [support(server, "ascend", name, linear.group_size).instead for server in READERS]
    return f"choose {next((text for text in advice if text), 'W8A8_DYNAMIC or FLOAT')} for it"


def check_expert_types(mixed: Mapping[str, list[str]]) -> list[str]:
    """Raises ExportError for a layer, as published, whose experts have several types: the loader
    takes that of all from the first one's. Returns nothing to say."""
    for layer, kinds in mixed.items():
        raise ExportError(
            f"{layer}: its experts have several types ({', '.join(kinds)}), and vllm-ascend gives "
            "all of a layer's that of the first",
            "let one glob of the recipe name them all",
        )
    return []


def _refuse_mixed(graph: CheckpointGraph) -> None:
    """Linears that servers fuse have one type, or the loader stops (vllm-ascend issue #2588)."""
    check_expert_types(mixed_experts(graph))
    for paths in graph.fused:
        types = {
            path: graph.quantized[path].scheme.name if path in graph.quantized else FLOAT
            for path in paths
        }
        if len(set(types.values())) > 1:
            listed = ", ".join(f"{path} {kind}" for path, kind in types.items())
            raise ExportError(
                f"linears that read one tensor have several types: {listed}",
                "servers fuse them into one matmul; let one glob of the recipe name them all",
            )
