"""Calibration data for SmolLM2: some of Python's language reference, some the model's own text."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WINDOW = 512
SEED = 0


def calibration_windows(folder: Path, cache: Path, reference: int, sampled: int) -> Tensor:
    """Token ids `[reference + sampled, 512]`; the model's own text is kept in the cache."""
    import panguq
    from demo.fetch import fetch_calibration_text
    from demo.run import windows_of

    parts = []
    if reference:
        tokenizer = panguq.load_tokenizer(folder)
        parts.append(windows_of(fetch_calibration_text(cache), tokenizer, reference))
    if sampled:
        parts.append(own_windows(folder, cache, sampled))
    return torch.cat(parts)


def own_windows(folder: Path, cache: Path, count: int) -> Tensor:
    """Token ids `[count, 512]` that the folder's model writes, as `compile(sampled=)` does."""
    from demo.fetch import once

    def write(target: Path) -> None:
        save_file({"ids": _written(folder, count)}, target)

    return load_file(once(cache / f"{folder.name}-own-{count}x{WINDOW}.safetensors", write))["ids"]


def _written(folder: Path, count: int) -> Tensor:
    import panguq
    from panguq.data.calibration import sample_sequences
    from panguq.tracing import trace

    model = panguq.load_pretrained(folder)
    gm, interface = trace(model, None, None)
    start = getattr(model.config, "bos_token_id", None) or 0
    generator = torch.Generator().manual_seed(SEED)
    return sample_sequences(gm, interface, start, generator, count, WINDOW, lambda *_: None)
