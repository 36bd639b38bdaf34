"""Launches panguq's own kernels on tensors of device "npu": grids, workspace, contiguity.

It needs triton-ascend, torch_npu and a device, and has not been run on one: the kernels it launches
are checked by the Triton interpreter, by the vendor's compiler and as native code (conformance).
Tensors of device "cuda" serve to check the kernels on a GPU (`make conformance-gpu`).
Arguments are those of the ops in `panguq.kernels.ascend`, which check them first.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from panguq.errors import LoweringError
from panguq.extras import missing
from panguq.kernels.ascend.own.tiles import SUMMED_ROWS, legal_tiles

NAMESPACE = "panguq_npu"
# triton-ascend refuses a grid of more programs than a 16-bit number holds.
LARGEST_GRID = 65535
LARGEST_PLACE = 2**31 - 1
# A flag is 32 bytes, the least that moves between memory and a core at a time.
FLAG_WORDS = 8
_SplitK = tuple[Tensor, Tensor, dict[str, int]]


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


# Flags of Split-K by device and stream. Every launch finds zeros and leaves zeros.
_FLAGS: dict[tuple[torch.device, int], Tensor] = {}


def _split_k(tokens: Tensor, grid: tuple[int, int, int], n: int, dtype: torch.dtype) -> _SplitK:
    """The workspace of a Split-K launch: partial sums [splits, m, n], flags, and their sizes."""
    splits, words = grid[2], grid[0] * grid[1] * grid[2] * FLAG_WORDS
    partials = tokens.new_empty((splits, tokens.shape[0], n), dtype=dtype)
    constants = {
        "FLAGS": FLAG_WORDS << (splits - 1).bit_length(),
        "COUNTED": _counts(tokens.device),
        "ROWS": SUMMED_ROWS,
    }
    return partials, _flags(tokens.device, words), constants


def _counts(device: torch.device) -> bool:
    """Whether programs count arrivals by atomics instead of raising flags (`split_k.py`)."""
    return device.type == "cuda"


def _options(device: torch.device) -> dict[str, bool]:
    """Options of the compiler: a GPU's would round once where the kernels say to round twice."""
    return {"enable_fp_fusion": False} if device.type == "cuda" else {}


def _flags(device: torch.device, words: int) -> Tensor:
    """int32 zeros, at least so many.

    Launches of one stream follow each other and may share them. A graph that is captured is
    replayed on any stream, so that it gets flags of its own.
    """
    stream = 0
    if device.type != "cpu":  # the interpreter's tensors are the CPU's
        if torch.get_device_module(device).is_current_stream_capturing():
            return torch.zeros(words, dtype=torch.int32, device=device)
        stream = torch.accelerator.current_stream(device).stream_id
    flags = _FLAGS.get((device, stream))
    if flags is None or flags.numel() < words:
        flags = torch.zeros(words, dtype=torch.int32, device=device)
        _FLAGS[device, stream] = flags
    return flags


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
    m, n = tokens.shape[0], 4 * weight.shape[1]
    result = tokens.new_empty((m, n))
    inputs = (
        tokens,
        weight.contiguous(),
        scale.contiguous(),
        None if offset is None else offset.contiguous(),
    )
    # One scale per output is one group that holds all of k.
    sizes = (m, n, k, group_size or k)
    constants = {
        "HAS_OFFSET": offset is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK_M": tile[0],
        "BLOCK_N": tile[1],
        "BLOCK_K": tile[2],
        **_options(tokens.device),
    }
    grid = grid_of(m, n, tile, splits)
    if m == 0:
        pass
    elif splits == 1:
        w4a16.w4a16_data_parallel[grid](*inputs, bias, result, *sizes, **constants)
    else:
        partials, flags, more = _split_k(tokens, grid, n, torch.float32)
        w4a16.w4a16_split_k[grid](
            *inputs, bias, partials, flags, result, *sizes, splits, **constants, **more
        )
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
    inputs = (tokens, weight.contiguous(), scale.contiguous(), token_scale, bias)
    constants = {
        "HAS_PERTOKEN_SCALE": token_scale is not None,
        "HAS_INT32_BIAS": bias is not None and bias.dtype == torch.int32,
        "HAS_FLOAT_BIAS": bias is not None and bias.dtype != torch.int32,
        "BLOCK_M": tile[0],
        "BLOCK_N": tile[1],
        "BLOCK_K": tile[2],
        **_options(tokens.device),
    }
    grid = grid_of(m, n, tile, splits)
    if m == 0:
        pass
    elif splits == 1:
        w8a8.w8a8_data_parallel[grid](*inputs, result, m, n, k, **constants)
    else:
        partials, flags, more = _split_k(tokens, grid, n, torch.int32)
        w8a8.w8a8_split_k[grid](
            *inputs, partials, flags, result, m, n, k, splits, **constants, **more
        )
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
        grid = (min(m, LARGEST_GRID),)
        options = _options(tokens.device)
        dynamic_quant[grid](tokens, codes, scale, m, k, BLOCK_K=block_k, **options)
    return codes.view(x.shape), scale.view(x.shape[:-1])
