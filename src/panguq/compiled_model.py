"""The compiled model of an artifact, or of a folder."""

from __future__ import annotations

from pathlib import Path

from panguq.artifact import LOWERED, Artifact
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.compiled_encoder import CompiledEncoder
from panguq.compiled_module import CompiledModule


def compiled_model(artifact: Artifact, stage: str = LOWERED) -> CompiledModule:
    """The model that runs this artifact: a `CompiledCausalLM` for a causal language model, a
    `CompiledEncoder` for another model of transformers."""
    return _KINDS.get(artifact.interface.kind, CompiledModule)(artifact, stage)


_KINDS = {"causal_lm": CompiledCausalLM, "encoder": CompiledEncoder}


def load(path: str | Path, stage: str = LOWERED) -> CompiledModule:
    """The compiled model in a folder that `save` wrote, to be run at `stage`.

    Weights are memory-mapped. A model of transformers comes back as a `CompiledCausalLM` or a
    `CompiledEncoder`, with its tokenizer if it was saved with one. Raises StorageError, naming the
    file, for anything missing, truncated, changed or from elsewhere.
    """
    from panguq.formats.own.model_folder import read_model

    return compiled_model(read_model(path), stage)
