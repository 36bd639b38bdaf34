"""How much disk a compile will need, from the model's modules and the recipe alone.

A forecast is for refusing what is hopeless before the work, so it is at the low end: codes at the
fewest bits that the recipe may choose, and every other tensor once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from panguq.errors import StorageError
from panguq.ir.quant_spec import QuantSpec
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.mixed_precision import MixedPrecision
from panguq.recipe import Recipe

_SCALE_BYTES = 2
_STACKED = 3  # axes of a weight `[experts, n, k]`


def forecast_bytes(
    model: nn.Module, recipe: Recipe, dtype: torch.dtype | None = None
) -> tuple[int, int]:
    """Bytes of codes with their scales, and of all other tensors, at the least.

    model: with weights, fake ones or none. dtype: what it is cast to, None if it is not.
    """
    assign = AssignSchemes(tuple(recipe.schemes.items()), recipe.head)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    codes = others = 0
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            spec = None
            if name == "weight" and tensor.dim() == 2 and not isinstance(module, nn.Embedding):
                spec = _fewest_bits(assign, recipe, path, is_head=module is head)
            elif name != "weight" and tensor.dim() == _STACKED:  # those of all experts
                spec = _fewest_bits(assign, recipe, f"{path}.{name}", is_head=False)
            if spec is not None:
                codes += tensor.numel() * spec.bits // 8 + tensor.numel() // 256 * _SCALE_BYTES
            elif not (module is head and _is_tied(model, tensor)):
                item = dtype.itemsize if dtype and tensor.is_floating_point() else tensor.itemsize
                others += tensor.numel() * item
    return codes, others


def check_disk(places: dict[Path, int]) -> None:
    """Raises StorageError if a disk has less free than what is to be written to its places.

    `places` are folders that exist, and the bytes that each will need.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for place, needed in places.items():
        device = os.stat(place).st_dev
        first, so_far = disks.get(device, (place, 0))
        disks[device] = (first, so_far + needed)
    for place, needed in disks.values():
        free = shutil.disk_usage(place).free
        if free < needed:
            raise StorageError(
                f"{place}: not enough space: the compile will write at least "
                f"{_size(needed)} there, and {_size(free)} are free",
                "free some space there, or choose another disk (--out, --work-dir)",
            )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _fewest_bits(
    assign: AssignSchemes, recipe: Recipe, path: str, is_head: bool
) -> QuantSpec | None:
    """The narrowest weights that the module at `path` may get; None where it stays float."""
    scheme, _ = assign.scheme_for(path, lambda: is_head)
    if scheme.weight is None:
        return None
    choices = [
        choice
        for step in recipe.passes
        if isinstance(step, MixedPrecision)
        for choice in step.schemes
    ]
    return min((s.weight for s in (scheme, *choices) if s.weight), key=lambda spec: spec.bits)


def _is_tied(model: nn.Module, tensor: torch.Tensor) -> bool:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return embeddings is not None and getattr(embeddings, "weight", None) is tensor
