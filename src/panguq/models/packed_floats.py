"""Weights that a folder holds as floats of 8 or 4 bits with scales, made into ordinary ones.

    fp8                 X F8_E4M3 [n, k], X_scale_inv [ceil(n / 128), ceil(k / 128)] or one number
                        (DeepSeek-V3; the block's size is in config.json)
    compressed-tensors  X F8_E4M3 [n, k], X_scale [n, 1], one number, or one for each block
    mxfp4               X_blocks U8 [e, n, k / 32, 16], X_scales U8 [e, n, k / 32], for X [e, k, n]:
                        two codes of E2M1 a byte, low half first, times 2^(scale - 127) (gpt-oss)

A value is its code times its scale in float32, rounded once to the model's dtype, as transformers
does it. Tensors are made one after another, in slices, and lie in nameless files, so that a model
needs no memory for them; the disk holds a copy in the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from panguq.errors import InputError, StorageError
from panguq.models.checkpoint_files import StoredTensor
from panguq.models.packed_integers import PackedIntegers, packed_integers
from panguq.tensors.dtypes import dtype_name
from panguq.tensors.safetensors_files import DTYPES
from panguq.tensors.weight_store import WeightStore

_SLICE_VALUES = 1 << 24  # in float32: 64 MiB
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127
_NOT_A_NUMBER = 255
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_OF_INPUTS = (".input_scale", ".activation_scale")
_AGAIN = "the checkpoint is damaged or belongs to another config; download it again"


@dataclass(frozen=True)
class PackedFloats:
    """How a folder's weights are packed. `block`: the rows and columns that share a scale; None
    where config.json does not say, and there is one for each row or for the whole weight."""

    method: str
    block: tuple[int, int] | None
    dtype: torch.dtype

    @property
    def scale(self) -> str:
        """What stands behind a weight's name in that of its scales."""
        return {"fp8": "_scale_inv", "mxfp4": "_scales"}.get(self.method, "_scale")

    @property
    def codes(self) -> str:
        """What stands behind a weight's name in that of its codes."""
        return "_blocks" if self.method == "mxfp4" else ""

    def weights(self, tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
        """The weights that are packed, by name. Raises InputError for one without scales."""
        names = {tensor.name for tensor in tensors}
        found = {}
        for tensor in tensors:
            name = tensor.name.removesuffix(self.codes)
            if tensor.name == name + self.codes and self._is_packed(tensor):
                if name + self.scale not in names:
                    raise InputError(
                        f"{tensor.file}: {tensor.name} is stored as {tensor.dtype} without "
                        f"{name + self.scale}",
                        _AGAIN,
                    )
                found[name] = tensor
        return found

    def plain(self, tensors: list[StoredTensor]) -> list[StoredTensor]:
        """The tensors as they are after `unpack`: each weight once, in the model's dtype."""
        packed = self.weights(tensors)
        done = {name + end for name in packed for end in (self.codes, self.scale)}
        kept = [t for t in tensors if t.name not in done and not t.name.endswith(_OF_INPUTS)]
        factor = 2 if self.method == "mxfp4" else 1
        return kept + [
            replace(t, name=name, dtype=DTYPES[self.dtype], elements=t.elements * factor)
            for name, t in packed.items()
        ]

    def unpack(
        self, tensors: list[StoredTensor], state: Mapping[str, Tensor], store: WeightStore
    ) -> dict[str, Tensor]:
        """The tensors of `plain` by name; those that were packed are made now, in `store`.

        Raises StorageError, naming the weight, for scales that do not fit it, are not finite or
        not there, and where the disk is full.
        """
        packed = self.weights(tensors)
        made = {}
        for tensor in self.plain(tensors):
            codes = packed.get(tensor.name)
            if codes is None:
                made[tensor.name] = state[tensor.name]
                continue
            place = f"{codes.file}: {tensor.name}"
            scale = state[tensor.name + self.scale]
            make = _from_mxfp4 if self.method == "mxfp4" else self._from_fp8
            made[tensor.name] = make(state[codes.name], scale, self.dtype, store, place)
        return made

    def _is_packed(self, tensor: StoredTensor) -> bool:
        return tensor.dtype in (("U8",) if self.method == "mxfp4" else ("F8_E4M3", "F8_E5M2"))

    def _from_fp8(
        self, codes: Tensor, scale: Tensor, dtype: torch.dtype, store: WeightStore, place: str
    ) -> Tensor:
        n, k = codes.shape[-2:] if codes.dim() >= 2 else (1, codes.numel())
        blocks = {(n, 1): (1, k), (1, 1): (n, k)}
        if self.block is not None:
            height, width = self.block
            blocks[math.ceil(n / height), math.ceil(k / width)] = self.block
        grid = (1, 1) if scale.numel() == 1 else tuple(scale.shape)
        if codes.dim() != 2 or grid not in blocks:
            raise _no_fit(place, codes, scale)
        height, width = blocks[grid]
        scales = _finite(scale.float().reshape(grid), place)
        out = store.empty(codes.shape, dtype)
        step = max(_SLICE_VALUES // (k * height), 1) * height
        for start in range(0, n, step):
            rows = codes[start : start + step].float()
            own = scales[start // height : math.ceil((start + len(rows)) / height)]
            own = own.repeat_interleave(height, 0)[: len(rows)]
            rows *= own if width == k else own.repeat_interleave(width, 1)[:, :k]
            out[start : start + step] = rows
        return out


def _from_mxfp4(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, store: WeightStore, place: str
) -> Tensor:
    if codes.dim() != 4 or codes.shape[:-1] != scale.shape or scale.dtype != torch.uint8:
        raise _no_fit(place, codes, scale)
    experts, n, groups, half = codes.shape
    if bool((scale == _NOT_A_NUMBER).any()):
        raise StorageError(f"{place}: a scale is no number", _AGAIN)
    values = torch.tensor(_E2M1)
    out = store.empty((experts, groups * half * 2, n), dtype)
    step = max(_SLICE_VALUES // (groups * half * 2), 1)
    for expert in range(experts):
        for start in range(0, n, step):
            part = codes[expert, start : start + step].int()
            pairs = torch.stack([values[part & 15], values[part >> 4]], -1).flatten(-2)
            power = scale[expert, start : start + step].int() - _BIAS
            rows = torch.ldexp(pairs, power[..., None]).flatten(-2)
            out[expert, :, start : start + step] = rows.T
    return out


def packed_weights(data: Mapping[str, Any], place: object) -> PackedFloats | PackedIntegers | None:
    """How the weights are packed that belong to this config.json; None if they are not.

    Raises InputError, in one sentence, for a model that is quantized in another way.
    """
    found = list(_configs(data))
    if not found:
        return None
    (part, config), *more = found
    method = str(config.get("quant_method", ""))
    block: object = None
    takes = not more and part is data
    if takes and (integers := packed_integers(config, place)) is not None:
        return integers
    if method == "fp8":
        block = config.get("weight_block_size")
    elif method == "compressed-tensors":
        weights = [g.get("weights") for g in _groups(config)]
        takes &= bool(weights) and all(
            isinstance(w, dict) and w.get("type") == "float" and w.get("num_bits") == 8
            for w in weights
        )
        blocks = {str(w.get("block_structure")): w.get("block_structure") for w in weights if w}
        block = next(iter(blocks.values())) if len(blocks) == 1 else None
    elif method != "mxfp4":
        takes = False
    if not takes:
        raise InputError(
            f"{place}: the model is quantized already ({method or 'in a way that is not named'})",
            "give the float checkpoint that it was made from; of quantized ones those with weights "
            "in FP8 (fp8, compressed-tensors) and MXFP4 are read, and weight-only ones in integers "
            "(gptq, awq, compressed-tensors)",
        )
    named = str(data.get("dtype") or data.get("torch_dtype") or "").removeprefix("torch.")
    return PackedFloats(method, _block(block, place), _DTYPES.get(named, torch.bfloat16))


def _configs(data: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """What a config.json and its parts say of quantization, each with the part that says it."""
    for part in (data, *(value for value in data.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                yield part, part[key] if isinstance(part[key], dict) else {}


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups")
    return [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []


def _block(block: object, place: object) -> tuple[int, int] | None:
    if block is None:
        return None
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or not all(isinstance(size, int) and size > 0 for size in block):  # type: ignore[attr-defined]
        raise StorageError(f"{place}: {block!r} is no size of a block of weights", _AGAIN)
    return int(block[0]), int(block[1])  # type: ignore[index]


def _finite(scale: Tensor, place: str) -> Tensor:
    if not bool(scale.isfinite().all()):
        raise StorageError(f"{place}: a scale is not finite", _AGAIN)
    return scale


def _no_fit(place: str, codes: Tensor, scale: Tensor) -> StorageError:
    return StorageError(
        f"{place}: codes {dtype_name(codes.dtype)} {list(codes.shape)} have scales "
        f"{dtype_name(scale.dtype)} {list(scale.shape)}, which do not fit them",
        _AGAIN,
    )
