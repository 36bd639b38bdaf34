"""Launches panguq's own kernels on tensors of device "npu": grids, workspace, contiguity.

It needs triton-ascend, torch_npu and a device, and has not been run on one: the kernels it launches
are checked by the Triton interpreter, by the vendor's compiler and as native code (conformance).
Arguments are those of the ops in `panguq.kernels.ascend`, which check them first.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from panguq.errors import LoweringError
from panguq.extras import missing
from panguq.kernels.ascend.own.tiles import legal_tiles

NAMESPACE = "panguq_npu"
# triton-ascend refuses a grid of more programs than a 16-bit number holds.
LARGEST_GRID = 65535
LARGEST_PLACE = 2**31 - 1


def _kernels(module: str) -> ModuleType:
    """A file of kernels, which imports triton. Raises LoweringError if that is not there."""
    try:
        return import_module(f"panguq.kernels.ascend.own.triton.{module}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        what, otherwise = "running panguq's own kernels", "compile with the vendor's kernels alone"
        raise missing("triton", what, otherwise, LoweringError) from None


def grid_of(m: int, n: int, tile: list[int], splits: int = 1) -> tuple[int, int, int]:
    """Programs along m, n and the splits; LoweringError if there are too many, or too many sums."""
    grid = (-(-m // tile[0]), -(-n // tile[1]), splits)
    programs = grid[0] * grid[1] * grid[2]
    hint = "take a larger tile, fewer splits, or fewer tokens at a time"
    if programs > LARGEST_GRID:
        raise LoweringError(
            f"m={m}, n={n} in tiles of {tile[0]} x {tile[1]} and {splits} splits are {programs}"
            f" programs, more than {LARGEST_GRID}",
            hint,
        )
    if splits * m * n > LARGEST_PLACE:
        raise LoweringError(f"{splits} x {m} x {n} sums: the kernels count places in 32 bits", hint)
    return grid


def _reduce(
    partials: Tensor,
    scale: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    result: Tensor,
) -> None:
    """partials float32 or int32 [splits, m, n] -> result [m, n]."""
    reduce_partials = _kernels("reduce_partials").reduce_partials
    splits, m, n = partials.shape
    tile = legal_tiles("reduce_partials")[0]
    reduce_partials[grid_of(m, n, list(tile))](
        partials,
        scale,
        pertoken_scale,
        bias,
        result,
        m,
        n,
        splits,
        HAS_SCALE=scale is not None,
        HAS_PERTOKEN_SCALE=pertoken_scale is not None,
        HAS_INT32_BIAS=bias is not None and bias.dtype == torch.int32,
        HAS_FLOAT_BIAS=bias is not None and bias.dtype != torch.int32,
        BLOCK_M=tile[0],
        BLOCK_N=tile[1],
    )


def launch_w4a16(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    splits: int,
    tile: list[int],
) -> Tensor:
    """w4a16: the data-parallel kernel for one split, Split-K for more."""
    w4a16 = _kernels("w4a16")
    k = x.shape[-1]
    tokens = x.reshape(-1, k).contiguous()
    packed = weight.contiguous().view(torch.uint8)
    m, n = tokens.shape[0], 2 * packed.shape[1]
    result = tokens.new_empty((m, n))
    inputs = (tokens, packed, scale.contiguous(), None if offset is None else offset.contiguous())
    # One scale per output is one group that holds all of k.
    sizes = (m, n, k, group_size or k)
    blocks = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": tile[2]}
    has_offset = offset is not None
    if m == 0:
        pass
    elif splits == 1:
        w4a16.w4a16_data_parallel[grid_of(m, n, tile)](
            *inputs,
            bias,
            result,
            *sizes,
            HAS_OFFSET=has_offset,
            HAS_BIAS=bias is not None,
            **blocks,
        )
    else:
        partials = tokens.new_empty((splits, m, n), dtype=torch.float32)
        w4a16.w4a16_split_k[grid_of(m, n, tile, splits)](
            *inputs, partials, *sizes, splits, HAS_OFFSET=has_offset, **blocks
        )
        _reduce(partials, None, None, bias, result)
    return result.view(*x.shape[:-1], n)


def launch_w8a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    splits: int,
    tile: list[int],
) -> Tensor:
    """w8a8: the data-parallel kernel for one split, Split-K for more."""
    w8a8 = _kernels("w8a8")
    k, n = weight.shape
    tokens = x.reshape(-1, k).contiguous()
    m = tokens.shape[0]
    result = tokens.new_empty((m, n), dtype=output_dtype)
    token_scale = None if pertoken_scale is None else pertoken_scale.reshape(-1).contiguous()
    blocks = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": tile[2]}
    if m == 0:
        pass
    elif splits == 1:
        w8a8.w8a8_data_parallel[grid_of(m, n, tile)](
            tokens,
            weight.contiguous(),
            scale.contiguous(),
            token_scale,
            bias,
            result,
            m,
            n,
            k,
            HAS_PERTOKEN_SCALE=token_scale is not None,
            HAS_INT32_BIAS=bias is not None and bias.dtype == torch.int32,
            HAS_FLOAT_BIAS=bias is not None and bias.dtype != torch.int32,
            **blocks,
        )
    else:
        partials = tokens.new_empty((splits, m, n), dtype=torch.int32)
        w8a8.w8a8_split_k[grid_of(m, n, tile, splits)](
            tokens, weight.contiguous(), partials, m, n, k, splits, **blocks
        )
        _reduce(partials, scale.contiguous(), token_scale, bias, result)
    return result.view(*x.shape[:-1], n)


def launch_dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """dynamic_quant."""
    dynamic_quant = _kernels("dynamic_quant").dynamic_quant
    k = x.shape[-1]
    tokens = x.reshape(-1, k).contiguous()
    m = tokens.shape[0]
    codes = tokens.new_empty((m, k), dtype=torch.int8)
    scale = tokens.new_empty((m,), dtype=torch.float32)
    if m > 0:
        block_k = legal_tiles("dynamic_quant")[0][2]
        # Each program takes every LARGEST_GRID-th token, so that any m will do.
        dynamic_quant[(min(m, LARGEST_GRID),)](tokens, codes, scale, m, k, BLOCK_K=block_k)
    return codes.view(x.shape), scale.view(x.shape[:-1])
