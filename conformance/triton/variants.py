"""The kernels with their argument types and compile-time constants: what a launch would compile."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from panguq.kernels.ascend.own.tiles import SUMMED_ROWS, Tile
from panguq.kernels.ascend.own.triton.launch import FLAG_WORDS

MATMULS = ("w4a16_data_parallel", "w4a16_split_k", "w8a8_data_parallel", "w8a8_split_k")
KERNELS = (*MATMULS, "dynamic_quant")
# Triton's names of types.
BIAS_TYPE = {"bf16": "fp32", "fp16": "fp16"}


@dataclass(frozen=True)
class Variant:
    """A kernel at a tile: `signature` has the types of run-time arguments, in order."""

    kernel: str
    tile: Tile
    signature: dict[str, str]
    constants: dict[str, Any]

    @property
    def function(self) -> Any:
        """The kernel, as Triton's decorator left it."""
        module = {"w4a16": "w4a16", "w8a8_": "w8a8"}.get(self.kernel[:5], self.kernel)
        return getattr(import_module(f"panguq.kernels.ascend.own.triton.{module}"), self.kernel)

    @property
    def name(self) -> str:
        """A name for files and reports."""
        flags = [name[4:].lower() for name, value in self.constants.items() if value is True]
        return "-".join([self.kernel, "x".join(map(str, self.tile)), *flags])


def pointers_of(at_tile: Variant) -> dict[str, int]:
    """The place of each pointer among the kernel's run-time arguments, by its name."""
    names = [name for name, kind in at_tile.signature.items() if kind.startswith("*")]
    return {name.removesuffix("_ptr"): place for place, name in enumerate(names)}


def _variant(
    kernel: str,
    tile: Tile,
    pointers: dict[str, str | None],
    sizes: tuple[str, ...],
    **constants: bool | int,
) -> Variant:
    """An absent pointer is a constant None, as Triton makes it of a None argument."""
    signature = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items() if kind}
    absent = {f"{name}_ptr": None for name, kind in pointers.items() if not kind}
    return Variant(kernel, tile, {**signature, **dict.fromkeys(sizes, "i32")}, absent | constants)


def variant(
    kernel: str,
    tile: Tile,
    dtype: str = "bf16",
    offset: bool = True,
    bias: str | None = "float",
    pertoken_scale: bool = True,
    splits: int = 8,
) -> Variant:
    """The kernel at this tile. `dtype` is that of a float input, or of the result of int8 ones.

    `bias` is "float", "int32" or None; `splits` the most that a Split-K kernel takes.
    """
    if kernel == "dynamic_quant":
        pointers = {"x": dtype, "codes": "i8", "scale": "fp32"}
        return _variant(kernel, tile, pointers, ("m", "k"), BLOCK_K=tile[2])
    constants: dict[str, bool | int] = {
        "BLOCK_M": tile[0],
        "BLOCK_N": tile[1],
        "BLOCK_K": tile[2],
    }
    workspace: dict[str, str | None] = {}
    sizes: tuple[str, ...] = ("m", "n", "k")
    is_w4a16 = kernel.startswith("w4a16")
    if is_w4a16:
        sizes += ("group_size",)
    if kernel.endswith("split_k"):
        constants |= {"FLAGS": FLAG_WORDS << (splits - 1).bit_length(), "ROWS": SUMMED_ROWS}
        constants["COUNTED"] = False
        workspace = {"partials": "fp32" if is_w4a16 else "i32", "flags": "i32"}
        sizes += ("splits",)
    if is_w4a16:
        inputs = {"x": dtype, "weight": "i16", "scale": dtype, "offset": dtype if offset else None}
        inputs["bias"] = BIAS_TYPE[dtype] if bias else None
        constants |= {"HAS_OFFSET": offset, "HAS_BIAS": bias is not None}
    else:
        inputs = {"x": "i8", "weight": "i8", "scale": "fp32"}
        inputs["pertoken_scale"] = "fp32" if pertoken_scale else None
        inputs["bias"] = {"float": "fp32", "int32": "i32", None: None}[bias]
        constants |= {
            "HAS_PERTOKEN_SCALE": pertoken_scale,
            "HAS_INT32_BIAS": bias == "int32",
            "HAS_FLOAT_BIAS": bias == "float",
        }
    return _variant(kernel, tile, {**inputs, **workspace, "result": dtype}, sizes, **constants)
