"""W8A8 by panguq's own kernel: int8 codes times int8 weights, exact int32 sums, then scales.

With one split (data-parallel) each core computes whole outputs; with more, k is divided, too
(Split-K). As int32 sums are exact in any order, both give the same bits. The body here is what the
Triton kernels in `triton/w8a8.py` compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.errors import LoweringError
from panguq.ir.ops.opset import define_op
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.own.tiles import tile_refusal
from panguq.kernels.ascend.own.triton.launch import NAMESPACE, launch_w8a8
from panguq.kernels.cpu.int8_linear import int32_matmul

# |code| <= 128 and |weight| <= 128, and the sum must fit int32.
LARGEST_K = (2**31 - 1) // (128 * 128)
OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(
    m: int | None,
    n: int,
    k: int,
    splits: int = 1,
    tile: tuple[int, int, int] | None = None,
    chip: Chip | None = None,
) -> str | None:
    """Why the kernels cannot do this matmul of m tokens (None: any), n outputs, k inputs.

    `chip`: the one that has room for the tile; None: any that is known.
    """
    if k > LARGEST_K:
        return f"k={k} is more than {LARGEST_K}: a sum might not fit int32"
    if splits < 1:
        return f"{splits} splits: there is at least one"
    if tile is None:
        return None
    if reason := tile_refusal("w8a8_split_k" if splits > 1 else "w8a8_data_parallel", tile, chip):
        return reason
    if splits > -(-k // tile[2]):
        return f"{splits} splits: k={k} has only {-(-k // tile[2])} blocks of {tile[2]}"
    return None


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    splits: int,
    tile: list[int],
) -> None:
    """Raise LoweringError unless the arguments are what the op documents."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise LoweringError(f"{NAMESPACE}.w8a8: {message}")

    require(x.dtype == torch.int8, f"x is {x.dtype}, not int8")
    require(weight.dtype == torch.int8, f"weight is {weight.dtype}, not int8")
    require(weight.dim() == 2, f"weight has {weight.dim()} dimensions, not 2")
    k, n = weight.shape
    require(x.shape[-1] == k, f"x has {x.shape[-1]} inputs, weight {k}")
    require(len(tile) == 3, f"tile {tile} is not (block_m, block_n, block_k)")
    reason = refusal(None, n, k, splits, (tile[0], tile[1], tile[2]))
    require(reason is None, str(reason))
    require(output_dtype in OUTPUT_DTYPES, f"output_dtype {output_dtype} is no float dtype")
    require(scale.dtype == torch.float32, f"scale is {scale.dtype}, not float32")
    require(tuple(scale.shape) == (n,), f"scale is {list(scale.shape)}, not [{n}]")
    if pertoken_scale is not None:
        dtype = pertoken_scale.dtype
        require(dtype == torch.float32, f"pertoken_scale is {dtype}, not float32")
        require(
            pertoken_scale.shape == x.shape[:-1],
            f"pertoken_scale is {list(pertoken_scale.shape)}, not {list(x.shape[:-1])}",
        )
    if bias is not None:
        require(tuple(bias.shape) == (n,), f"bias is {list(bias.shape)}, not [{n}]")
        require(
            bias.dtype == torch.float32 or (bias.dtype == torch.int32 and pertoken_scale is None),
            f"bias is {bias.dtype}; it is float32, or int32 without pertoken_scale",
        )


def _fake(x: Tensor, weight: Tensor, output_dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=output_dtype)


@define_op(
    "w8a8(Tensor x, Tensor weight, Tensor scale, Tensor? pertoken_scale, Tensor? bias,"
    " ScalarType output_dtype, int splits, int[] tile) -> Tensor",
    fake=_fake,
    namespace=NAMESPACE,
    check=_check,
    npu=launch_w8a8,
)
def w8a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    splits: int,
    tile: list[int],
) -> Tensor:
    """(sum_k x * weight + int32 bias) * scale * pertoken_scale + float32 bias: [..., n].

    x int8 [..., k]; weight int8 [k, n]; scale float32 [n]; pertoken_scale float32 [...] or None;
    bias [n], float32, or int32 without pertoken_scale. Sums are exact int32, the rest is float32
    in the written order, rounded once to `output_dtype`. With `splits` above 1, a kernel divides k
    into so many parts of whole blocks; the bits are the same. Raises LoweringError.
    """
    # int32 sums are the same in any order, so there is nothing to divide here.
    total = int32_matmul(x.reshape(-1, x.shape[-1]), weight.t())
    if bias is not None and bias.dtype == torch.int32:
        total.add_(bias)
    result = total.to(torch.float32).mul_(scale)
    if pertoken_scale is not None:
        result.mul_(pertoken_scale.reshape(-1, 1))
    if bias is not None and bias.dtype == torch.float32:
        result.add_(bias)
    return result.to(output_dtype).view(*x.shape[:-1], weight.shape[1])
