"""panguq's Triton kernels on a GPU against the references that an NPU's are checked with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from conformance.triton.bounds import assert_within_bound, w4a16_inputs
from panguq.kernels.ascend.own.dynamic_quant import dynamic_quant
from panguq.kernels.ascend.own.triton.launch import launch_dynamic_quant, launch_w4a16, launch_w8a8
from panguq.kernels.ascend.own.w8a8 import w8a8

DEVICE = torch.device("cuda")
REPEATS = 50
W4A16_TILES = [[16, 128, 64], [16, 256, 32], [32, 128, 128]]
W8A8_TILES = [[16, 64, 512], [16, 256, 256]]
SPLITS = [1, 2, 5]
SIZES = [(1, 256, 4096), (17, 328, 1000)]


@dataclass(frozen=True)
class Check:
    """One kernel at one tile. `fault`: what was wrong; None if nothing was."""

    name: str
    fault: str | None


def checks() -> Iterator[Check]:
    """Every kernel over tiles, splits and sizes; W8A8 in the reference's bits, W4A16 within the
    bound of summation, each the same bits in every run."""
    torch.manual_seed(0)
    for (m, n, k), tile, splits in product(SIZES, W8A8_TILES, SPLITS):
        name = f"w8a8 m={m} n={n} k={k} tile={tile} splits={splits}"
        yield _check(name, partial(_w8a8, m, n, k, tile, splits))
    dtypes = (torch.float16, torch.bfloat16)
    for (m, n, k), tile, splits, dtype in product(SIZES, W4A16_TILES, SPLITS, dtypes):
        name = f"w4a16 m={m} n={n} k={k} tile={tile} splits={splits} {str(dtype)[6:]}"
        yield _check(name, partial(_w4a16, m, n, k, tile, splits, dtype))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield _check(f"dynamic_quant {str(dtype)[6:]}", partial(_dynamic_quant, dtype))


def _check(name: str, run: Callable[[], None]) -> Check:
    try:
        run()
    except AssertionError as error:
        return Check(name, str(error) or "the result is outside its bound")
    except Exception as error:  # what a compiler of GPU code refuses is a finding, too
        return Check(name, f"{type(error).__name__}: {error}".splitlines()[0])
    return Check(name, None)


def _same_bits(run: Callable[[], Tensor]) -> Tensor:
    """The result on the CPU, after repeated launches that share their flags."""
    first = run()
    for repeat in range(REPEATS):
        assert torch.equal(run(), first), f"run {repeat + 2} gave other bits than the first"
    return first.cpu()


def _w8a8(m: int, n: int, k: int, tile: list[int], splits: int) -> None:
    x, weight = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((m, k), (k, n)))
    given = (x, weight, torch.rand(n) * 0.01, torch.rand(m), torch.randn(n))
    there = [tensor.to(DEVICE) for tensor in given]
    found = _same_bits(lambda: launch_w8a8(*there, torch.float32, splits, tile))
    expected = w8a8(*given, torch.float32, 1, [16, 64, 512])
    assert torch.equal(found, expected), "the result is not the reference's bits"


def _w4a16(m: int, n: int, k: int, tile: list[int], splits: int, dtype: torch.dtype) -> None:
    inputs = w4a16_inputs(m, n, k, 128, dtype, True, True)
    there = [None if tensor is None else tensor.to(DEVICE) for tensor in inputs]
    x, weight, scale, offset, bias = there
    assert x is not None and weight is not None and scale is not None
    found = _same_bits(lambda: launch_w4a16(x, weight, scale, offset, bias, 128, splits, tile))
    steps = 4 * -(-k // tile[2])
    # Tensor cores truncate where they add, to units of 2**-23 or finer (Fasi et al., Numerical
    # behavior of NVIDIA tensor cores, 2021): twice the roundoff that the bound is written for.
    assert_within_bound(found, *inputs, 128, 2 * (k + splits + 1 + steps))


def _dynamic_quant(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 5000) * 10.0 ** torch.randint(-7, 4, (40, 1))).to(dtype)
    x[0] = 0
    codes, scale = (tensor.cpu() for tensor in launch_dynamic_quant(x.to(DEVICE)))
    expected_codes, expected_scale = dynamic_quant(x)
    # Triton divides with an error of 2 units in the last place on a GPU.
    off = (scale - expected_scale).abs() > 2 * torch.finfo(torch.float32).eps * expected_scale
    assert not off.any(), f"{int(off.sum())} scales are more than 2 units off"
    far = (codes.int() - expected_codes.int()).abs() > 1
    assert not far.any(), f"{int(far.sum())} codes are more than 1 off"
