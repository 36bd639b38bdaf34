"""What whole models reach of a device's peaks, and what a kernel takes however little it does.

A kernel alone, on a square shape and in a loop, reaches more than a model does: shapes are narrow,
clocks fall, memory is cold. These numbers are of whole models, each with its source.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _of(default: float, source: str) -> Any:
    return field(default=default, metadata={"source": source})


_MSMODELING = "Huawei's msmodeling, tensor_cast/device.py"


@dataclass(frozen=True)
class Achieved:
    """Shares of peaks, and least times. `sources` says where each number is from."""

    cube_share: float = _of(0.7, f"{_MSMODELING}: compute efficiency")
    memory_share: float = _of(
        0.66, f"{_MSMODELING}: 0.6 of 1.6 TiB/s, which is 0.66 of the 1.6 TB/s of the targets"
    )
    matmul_us: float = _of(5.0, f"{_MSMODELING}: static cost of a matmul")
    vector_us: float = _of(2.0, f"{_MSMODELING}: static cost of a vector op")
    collective_us: float = _of(10.0, f"{_MSMODELING}: static cost of a collective")
    link_gb_per_s: float = _of(196.0, f"{_MSMODELING}: HCCS")

    @property
    def sources(self) -> dict[str, str]:
        """The source of every number."""
        return {f.name: f.metadata["source"] for f in fields(self)}


ACHIEVED = Achieved()
CARD_GIB = {"ascend910b1": 64, "ascend910b2": 64, "ascend910b3": 64, "ascend910b4": 32}
"""Memory of a card (msmodeling: 64 GB with 1.6 TiB/s, 32 GB with 0.8 TiB/s)."""
CARD_SHARE = 0.9
"""What vLLM takes of it unless told otherwise (gpu_memory_utilization)."""
