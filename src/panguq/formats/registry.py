"""The formats in which a compiled model is saved, by name. Each is loaded when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from panguq.errors import InputError
from panguq.suggest import did_you_mean

if TYPE_CHECKING:
    import torch

    from panguq.artifact import Artifact
    from panguq.formats.checkpoint.linear import LinearForm


@dataclass(frozen=True)
class Format:
    """A format: who reads it, and the functions that write it and check a place for it.

    A function is given itself, or as `module:function` and imported when it is used.
    """

    name: str
    readers: str
    writer: str | Callable[[Artifact, Path, bool], None]
    place_check: str | Callable[[Path, bool], None]
    linears: str | LinearsCheck = ""
    """Refuses what no reader takes; without it the format holds everything."""
    experts: str | ExpertsCheck = ""
    """The same of layers whose experts have several schemes."""

    def write(self, artifact: Artifact, path: Path, overwrite: bool = False) -> None:
        """Write the artifact as the folder `path`, whole or not at all.

        Raises PanguqError for what the format cannot express, StorageError for a place that is
        taken or cannot be written.
        """
        _function(self.writer)(artifact, path, overwrite)

    def check_place(self, path: Path, overwrite: bool) -> None:
        """Raises StorageError if `path` holds something that `write` would not replace."""
        _function(self.place_check)(path, overwrite)

    def linears_check(self) -> LinearsCheck | None:
        """What refuses linears that the format cannot hold; None if it holds all."""
        return _function(self.linears) if self.linears else None

    def experts_check(self) -> ExpertsCheck | None:
        """What refuses a layer's experts of several schemes; None if it holds them."""
        return _function(self.experts) if self.experts else None


LinearsCheck: TypeAlias = "Callable[[Mapping[str, LinearForm], torch.dtype], list[str]]"
"""Called with quantized linears by path and the model's dtype. Returns a sentence for each reader
that will not take them though another does; raises ExportError if none does."""

ExpertsCheck: TypeAlias = "Callable[[Mapping[str, list[str]]], list[str]]"
"""Called with the layers whose experts have several schemes, with these; otherwise as that."""

_CHECKPOINT_PLACE = "panguq.formats.checkpoint.folder:check_place"
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "panguq",
            "panguq.load",
            "panguq.formats.own.model_folder:save_model",
            "panguq.formats.own.storage:check_place",
        ),
        Format(
            "compressed-tensors",
            "transformers, vLLM and vllm-ascend",
            "panguq.formats.checkpoint.compressed_tensors:save_compressed_tensors",
            _CHECKPOINT_PLACE,
            "panguq.formats.checkpoint.compressed_tensors:check_linears",
            "panguq.formats.checkpoint.compressed_tensors:check_expert_schemes",
        ),
        Format(
            "ascend",
            "vllm-ascend and MindIE (msModelSlim's format)",
            "panguq.formats.checkpoint.ascend_v1:save_ascend_v1",
            _CHECKPOINT_PLACE,
            "panguq.formats.checkpoint.ascend_v1:check_linears",
            "panguq.formats.checkpoint.ascend_v1:check_expert_types",
        ),
        Format(
            "gptq",
            "GPTQModel, transformers, vLLM and SGLang",
            "panguq.formats.checkpoint.gptq:save_gptq",
            _CHECKPOINT_PLACE,
            "panguq.formats.checkpoint.gptq:check_linears",
            "panguq.formats.checkpoint.weight_only:check_experts_alike",
        ),
        Format(
            "awq",
            "transformers, vLLM, SGLang and lmdeploy",
            "panguq.formats.checkpoint.awq:save_awq",
            _CHECKPOINT_PLACE,
            "panguq.formats.checkpoint.awq:check_linears",
            "panguq.formats.checkpoint.weight_only:check_experts_alike",
        ),
    )
}


def add_format(format: Format) -> None:
    """Let `save`, the dry run and `--format` know a format. Raises InputError for a name taken."""
    if format.name in FORMATS:
        raise InputError(f"there is a format {format.name!r} already", "give it another name")
    FORMATS[format.name] = format


def find_format(name: str) -> Format:
    """The format of that name. Raises InputError, with the nearest, if there is none."""
    if name not in FORMATS:
        raise InputError(
            f"unknown format {name!r} of a saved model", did_you_mean(name, FORMATS, "formats")
        )
    return FORMATS[name]


def _function(place: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
