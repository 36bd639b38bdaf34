"""In what precision float matmuls of many tokens are fastest on this machine."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F

# A prompt's matmul that fits into the cache: some tenths of a millisecond on one core.
_TOKENS, _SIZE = 128, 512
_CALLS = 9


def multiplying_dtype(least: torch.dtype = torch.bfloat16) -> torch.dtype:
    """What a matmul that may be rounded to `least` multiplies in: `least`, unless that is bfloat16
    and float32 is faster here, as on processors with AVX512 but without AMX of some makers, and on
    all that emulate bfloat16."""
    if least == torch.bfloat16 and float32_is_faster():
        return torch.float32
    return least


def float32_is_faster() -> bool:
    """Whether float32 matmuls take less time than bfloat16 ones."""
    return faster_dtype() == torch.float32


def bfloat16_is_faster() -> bool:
    """Whether bfloat16 matmuls take less time than float32 ones."""
    return faster_dtype() == torch.bfloat16


@functools.cache
def faster_dtype() -> torch.dtype:
    """The one of float32 and bfloat16 whose matmuls are faster; measured once, in about 10 ms."""
    return measured_dtype()


def measured_dtype() -> torch.dtype:
    """`faster_dtype`, measured again.

    The processor's features do not tell: AVX512_BF16 doubles the speed on one and halves it on
    another, and settings such as `ONEDNN_MAX_CPU_ISA` hide it.
    """
    seconds = seconds_by_dtype()
    return min(seconds, key=seconds.__getitem__)


def seconds_by_dtype() -> dict[torch.dtype, float]:
    """What a matmul of 128 tokens takes in each type, on the threads that there are."""
    return {dtype: _seconds(dtype) for dtype in (torch.bfloat16, torch.float32)}


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of some calls, since what else the machine does only makes calls longer."""
    x, weight = torch.ones(_TOKENS, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    found = []
    with torch.no_grad():
        for _ in range(_CALLS):
            start = time.perf_counter()
            F.linear(x, weight)
            found.append(time.perf_counter() - start)
    return min(found)
