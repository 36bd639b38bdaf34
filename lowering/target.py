"""What a graph can be compiled for, as data: each number says where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Literal, get_args

from panguq.errors import LoweringError
from panguq.suggest import did_you_mean

TargetKind = Literal["cpu", "ascend"]


@dataclass(frozen=True)
class KernelCost:
    """An affine cost: `launch_us + weight bytes / gb_per_s + m·n·k / gmac_per_s`.

    `weight_bytes_per_weight` is what the kernel reads for each weight, once a call; `source` says
    where the numbers are from, as for `Constant`.
    """

    launch_us: float
    gb_per_s: float
    gmac_per_s: float
    weight_bytes_per_weight: float
    source: str = ""


@dataclass(frozen=True)
class Constant:
    """A number of a target. `source` names where it is published, or says "fitted to …"."""

    value: float
    unit: str
    source: str

    @property
    def fitted(self) -> bool:
        """Whether it was fitted to timings instead of looked up."""
        return self.source.startswith("fitted to ")


@dataclass(frozen=True)
class Target:
    """A machine and what its kernels cost.

    A CPU has one affine cost per kernel; an Ascend NPU has `constants`, from which
    `cost/model.py` computes the cost of any kernel. Both are plain data: see `target_files.py`.
    """

    name: str
    kernels: Mapping[str, KernelCost] = field(default_factory=dict)
    kind: TargetKind = "cpu"
    constants: Mapping[str, Constant] = field(default_factory=dict)

    def __getitem__(self, constant: str) -> float:
        """The value of a constant."""
        return self.constants[constant].value


CPU_KERNELS = (
    "linear",
    "int8_linear",
    "int8_weight_linear",
    "int8_weight_linear (converted)",
    "int4_linear",
    "dequantized_linear",
)
"""What a CPU target gives the cost of."""

ASCEND_UNITS: Mapping[str, str] = MappingProxyType(
    {
        "cube_cores": "cores",
        "vector_cores": "cores",
        "clock_mhz": "MHz",
        "l2_mib": "MiB",
        "hbm_gb_per_s": "GB/s",
        "l2_read_bytes_per_cycle": "B/cycle/cube core",
        "l2_write_bytes_per_cycle": "B/cycle/cube core",
        "vector_bytes_per_cycle": "B/cycle/vector core",
        "vector_lanes": "float16 lanes",
        "dequantize_instructions": "instructions/vector of weights",
        "memory_unit_bytes": "B",
        "float32_macs_per_cycle": "MAC/cycle/cube core",
        "vector_start_us": "us",
        "vector_start_per_wave_us": "us",
        "launch_us": "us",
        "core_load_bytes_per_cycle": "B/cycle/cube core",
        "vendor_dequantize_bytes_per_cycle": "B/cycle/vector core",
    }
)
"""All constants of an Ascend target and their units. A target file must give every one."""


def check_target(target: Target, source: str) -> Target:
    """The target itself. Raises LoweringError, naming `source` and the constant, if it is not
    complete or a number in it cannot be."""
    if target.kind not in get_args(TargetKind):
        raise LoweringError(
            f"{source}: kind: {target.kind!r} is no kind of target",
            did_you_mean(str(target.kind), get_args(TargetKind), "kinds"),
        )
    known = ASCEND_UNITS if target.kind == "ascend" else {}
    _check_names(target.constants, known, f"{source}: constants")
    for name, constant in target.constants.items():
        _check_number(constant.value, f"{source}: constants.{name}")
        if not constant.source:
            raise LoweringError(
                f"{source}: constants.{name}: has no source",
                "say where the number is from, or what it was fitted to",
            )
    for name in ("cube_cores", "vector_cores", "vector_lanes"):
        if name in target.constants and target[name] != int(target[name]):
            raise LoweringError(f"{source}: constants.{name}: {target[name]} is not whole")
    _check_names(
        target.kernels,
        dict.fromkeys(CPU_KERNELS) if target.kind == "cpu" else {},
        f"{source}: kernels",
    )
    for name, cost in target.kernels.items():
        where = f"{source}: kernels.{name}"
        for number in fields(cost):
            if number.name != "source":
                _check_number(getattr(cost, number.name), f"{where}.{number.name}")
        if not isinstance(cost.source, str) or not cost.source:
            raise LoweringError(
                f"{where}: has no source",
                "say what the numbers were fitted to; panguq tune writes such a file",
            )
    return target


def _check_names(given: Mapping[str, object], known: Mapping[str, object], where: str) -> None:
    for name in given:
        if name not in known:
            raise LoweringError(
                f"{where}: unknown name {name!r}", did_you_mean(name, known, "names")
            )
    missing = [name for name in known if name not in given]
    if missing:
        raise LoweringError(
            f"{where}.{missing[0]}: is missing",
            f"a target of this kind gives {', '.join(known)}",
        )


def _check_number(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LoweringError(f"{where}: {value!r} is not a number")
    if not math.isfinite(value):
        raise LoweringError(f"{where}: {value} is not finite")
    if value <= 0:
        raise LoweringError(f"{where}: {value} is not above zero")
