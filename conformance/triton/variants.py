"""The kernels with their argument types and compile-time constants: what a launch would compile."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from panguq.kernels.ascend.own.tiles import Tile

MATMULS = ("w4a16_data_parallel", "w4a16_split_k", "w8a8_data_parallel", "w8a8_split_k")
KERNELS = (*MATMULS, "reduce_partials", "dynamic_quant")
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
    partials: str = "fp32",
) -> Variant:
    """The kernel at this tile. `dtype` is that of a float input, or of the result of int8 ones.

    `bias` is "float", "int32" or None; `partials` the type that `reduce_partials` adds.
    """
    blocks = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": tile[2]}
    bias_type = {"float": "fp32", "int32": "i32", None: None}[bias]
    if kernel.startswith("w4a16"):
        inputs: dict[str, str | None] = {"x": dtype, "weight": "u8", "scale": dtype}
        inputs["offset"] = dtype if offset else None
        sizes = ("m", "n", "k", "group_size")
        if kernel == "w4a16_split_k":
            pointers = {**inputs, "partials": "fp32"}
            return _variant(kernel, tile, pointers, (*sizes, "splits"), HAS_OFFSET=offset, **blocks)
        pointers = {**inputs, "bias": BIAS_TYPE[dtype] if bias else None, "result": dtype}
        flags = {"HAS_OFFSET": offset, "HAS_BIAS": bias is not None}
        return _variant(kernel, tile, pointers, sizes, **flags, **blocks)
    if kernel == "w8a8_split_k":
        pointers = {"x": "i8", "weight": "i8", "partials": "i32"}
        return _variant(kernel, tile, pointers, ("m", "n", "k", "splits"), **blocks)
    if kernel == "dynamic_quant":
        pointers = {"x": dtype, "codes": "i8", "scale": "fp32"}
        return _variant(kernel, tile, pointers, ("m", "k"), BLOCK_K=tile[2])
    flags = {
        "HAS_PERTOKEN_SCALE": pertoken_scale,
        "HAS_INT32_BIAS": bias == "int32",
        "HAS_FLOAT_BIAS": bias == "float",
    }
    outputs = {
        "pertoken_scale": "fp32" if pertoken_scale else None,
        "bias": bias_type,
        "result": dtype,
    }
    if kernel == "w8a8_data_parallel":
        pointers = {"x": "i8", "weight": "i8", "scale": "fp32", **outputs}
        return _variant(kernel, tile, pointers, ("m", "n", "k"), **flags, **blocks)
    has_scale = partials == "i32"
    pointers = {"partials": partials, "scale": "fp32" if has_scale else None, **outputs}
    flags = {"HAS_SCALE": has_scale, **flags}
    return _variant(
        kernel, tile, pointers, ("m", "n", "splits"), **flags, BLOCK_M=tile[0], BLOCK_N=tile[1]
    )
