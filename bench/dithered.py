"""SmolLM2 off its 4-bit grid: the second yardstick of the accuracy table.

The model's weights were rounded to 4 bits in blocks of 32 before they were published. A quantizer
whose grid happens to be that one loses nothing, which says nothing about other models. Uniform
noise of at most half a step of that grid puts the weights where rounding may have found them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

BLOCK = 32
STEPS = 15  # between the smallest and the greatest of a block's 16 codes
SEED = 0


def dither(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The weight `[n, k]` plus noise, uniform within half a step of its block of 32 inputs.

    A block's step is (max - min) / 15. Raises ValueError where 32 does not divide k.
    """
    if weight.shape[1] % BLOCK:
        raise ValueError(f"blocks of {BLOCK} do not divide k = {weight.shape[1]}")
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / STEPS
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).flatten(1).to(weight.dtype)


def dither_model(model: nn.Module) -> None:
    """Dither all linears but the one that gives the logits, in place and in a fixed order."""
    generator = torch.Generator().manual_seed(SEED)
    logits = model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not logits:
                module.weight.copy_(dither(module.weight, generator))


def dithered_folder(folder: Path, cache: Path) -> Path:
    """The dithered copy of the model in a folder, written into the cache on first use."""
    import panguq
    from demo.fetch import once

    def write(target: Path) -> None:
        model = panguq.load_pretrained(folder)
        dither_model(model)
        model.save_pretrained(target)
        panguq.load_tokenizer(folder).save_pretrained(target)

    return once(cache / f"{folder.name}-dithered", write)
