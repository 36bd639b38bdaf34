"""What a graph can be compiled for, as data: each number says where it comes from."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from panguq.errors import LoweringError


@dataclass(frozen=True)
class KernelCost:
    """An affine cost: `launch_us + weight bytes / gb_per_s + m·n·k / gmac_per_s`.

    `weight_bytes_per_weight` is what the kernel reads for each weight, once a call.
    """

    launch_us: float
    gb_per_s: float
    gmac_per_s: float
    weight_bytes_per_weight: float


@dataclass(frozen=True)
class Target:
    """A machine and what its kernels cost."""

    name: str
    kernels: dict[str, KernelCost]


# Fitted to the medians of `python -m bench.cpu_kernels` on one thread of an AMD EPYC (Zen 4, AVX512
# with VNNI and BF16), PyTorch 2.13. They rank kernels; nothing else depends on them.
CPU = Target(
    name="cpu",
    kernels={
        "linear": KernelCost(7.4, 10.4, 42.0, 4.0),
        "int8_linear": KernelCost(29.0, 6.9, 157.0, 1.0),
        "int8_weight_linear": KernelCost(36.0, 11.1, 33.0, 1.0),
        "int8_weight_linear (converted)": KernelCost(59.0, 3.5, 80.0, 1.0),
        "int4_linear": KernelCost(17.0, 15.6, 39.0, 0.5),
        "dequantized_linear": KernelCost(41.0, 0.5, 78.0, 0.5),
    },
)

TARGETS: dict[str, Target] = {target.name: target for target in (CPU,)}


def find_target(name: str) -> Target:
    """The target called `name`. Raises LoweringError with the nearest name."""
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LoweringError(
            f"unknown target {name!r}", f"{hint}The targets are {', '.join(TARGETS)}"
        )
    return TARGETS[name]
