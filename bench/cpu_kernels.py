"""Time every CPU matmul of panguq against float32 F.linear, per shape and number of tokens.

    python bench/cpu_kernels.py --threads 1 2 --json cpu_kernels.json

The variants of a shape take turns, so that a slow moment of the machine hits all of them. Each
call uses the next of several copies of the weights: together they exceed the cache, as the layers
of a model do (`--warm` keeps one copy).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from panguq.kernels.cpu.dequantized_linear import dequantized_linear
from panguq.kernels.cpu.int4_linear import (
    int4_kernel_scales,
    int4_kernel_weight,
    int4_linear,
)
from panguq.kernels.cpu.int8_linear import int8_linear
from panguq.kernels.cpu.int8_weight_linear import int8_weight_linear
from panguq.kernels.packing import pack_int4
from panguq.kernels.quantize import quantize_per_token

SHAPES = [
    (192, 576),
    (576, 576),
    (960, 576),
    (1536, 576),
    (3072, 576),
    (576, 1536),
    (4096, 4096),
]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 512]
GROUP_SIZE = 32
COLD_BYTES = 96 * 2**20
MAX_COPIES = 64
SECONDS_PER_SAMPLE = 0.002

Call = Callable[[], object]


def copies(tensor: torch.Tensor, warm: bool) -> Callable[[], torch.Tensor]:
    """A function that returns the next copy of `tensor` in turn."""
    size = tensor.numel() * tensor.element_size()
    count = 1 if warm else min(MAX_COPIES, 1 + COLD_BYTES // size)
    turns = itertools.cycle([tensor] + [tensor.clone() for _ in range(count - 1)])
    return lambda: next(turns)


def variants(n: int, k: int, warm: bool) -> dict[str, Callable[[torch.Tensor], object]]:
    """Every op for one weight shape, as a function of float32 tokens [m, k]."""
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    packed = pack_int4(codes)
    group_scale = torch.rand(n, k // GROUP_SIZE) * 0.01 + 0.001
    weight_scale = torch.rand(n) * 0.01
    kernel_scales = int4_kernel_scales(group_scale, None)
    float_weight = copies(torch.randn(n, k), warm)
    int8_weight = copies(codes, warm)
    int4_weight = copies(int4_kernel_weight(packed), warm)
    canonical = copies(packed, warm)

    def w8a8(x: torch.Tensor) -> object:
        quantized, scale = quantize_per_token(x, 127)
        return multiply(quantized, scale)

    def multiply(quantized: torch.Tensor, scale: torch.Tensor) -> object:
        weight = int8_weight()
        return int8_linear(quantized, scale, None, weight, weight_scale, None, None, torch.float32)

    return {
        "float32": lambda x: F.linear(x, float_weight()),
        "int8_linear": lambda x: multiply(*ready(x)),
        "quantize_per_token + int8_linear": w8a8,
        "int8_weight_linear (bytes)": lambda x: int8_weight_linear(
            x, int8_weight(), weight_scale, None, len(x)
        ),
        "int8_weight_linear (converted)": lambda x: int8_weight_linear(
            x, int8_weight(), weight_scale, None, 0
        ),
        "int4_linear": lambda x: int4_linear(x, int4_weight(), kernel_scales, GROUP_SIZE, None),
        "dequantized_linear": lambda x: dequantized_linear(
            x, canonical(), group_scale, None, GROUP_SIZE, None, torch.bfloat16
        ),
    }


_ready: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def ready(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of these tokens, quantized once."""
    if id(x) not in _ready:
        _ready.clear()
        _ready[id(x)] = quantize_per_token(x, 127)
    return _ready[id(x)]


def sample_us(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def measure(calls: dict[str, Call], repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds per call: min, median and max over repeats, the variants taking turns."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, int(SECONDS_PER_SAMPLE * 1e6 / sample_us(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(sample_us(call, counts[name]))
    return {
        name: {"min_us": min(us), "median_us": statistics.median(us), "max_us": max(us)}
        for name, us in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--warm", action="store_true", help="keep the weights in the cache")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = []
    for n, k in SHAPES:
        ops = variants(n, k, options.warm)
        for threads, m in itertools.product(options.threads, options.tokens):
            torch.set_num_threads(threads)
            x = torch.randn(m, k)
            calls = {name: (lambda op=op, x=x: op(x)) for name, op in ops.items()}
            times = measure(calls, options.repeats)
            base_us = times["float32"]["median_us"]
            print(f"m={m} n={n} k={k} threads={threads}")
            for name, us in times.items():
                print(
                    f"  {name:34s} {us['median_us']:10.1f} us"
                    f"  ({us['min_us']:.1f} .. {us['max_us']:.1f})"
                    f"  {base_us / us['median_us']:6.2f}x",
                    flush=True,
                )
                rows.append({"m": m, "n": n, "k": k, "threads": threads, "op": name, **us})
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
