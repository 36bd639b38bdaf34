"""What a graph can be compiled for, as data: each number says where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
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
    `cost_model.py` computes the cost of any kernel. Both are plain data: see `target_files.py`.
    """

    name: str
    kernels: Mapping[str, KernelCost] = field(default_factory=dict)
    kind: TargetKind = "cpu"
    constants: Mapping[str, Constant] = field(default_factory=dict)

    def __getitem__(self, constant: str) -> float:
        """The value of a constant."""
        return self.constants[constant].value


# Written by hand from what `panguq tune` fits; docs/cpu-target.md has its figures. They rank
# kernels; nothing else depends on them.
_CPU_SOURCE = (
    "fitted to medians of panguq tune on AMD EPYC (Zen 4, AVX512 with VNNI and BF16), 1 thread, "
    "PyTorch 2.13.0, cpu clock"
)
CPU = Target(
    name="cpu",
    kernels={
        "linear": KernelCost(10.7, 11.1, 46.0, 4.0, _CPU_SOURCE),
        "int8_linear": KernelCost(20.6, 6.21, 173.0, 1.0, _CPU_SOURCE),
        "int8_weight_linear": KernelCost(27.1, 9.65, 34.6, 1.0, _CPU_SOURCE),
        "int8_weight_linear (converted)": KernelCost(65.8, 3.82, 87.4, 1.0, _CPU_SOURCE),
        "int4_linear": KernelCost(18.2, 18.3, 41.2, 0.5, _CPU_SOURCE),
        "dequantized_linear": KernelCost(152.0, 0.522, 86.9, 0.5, _CPU_SOURCE),
    },
)

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

# Fitted constants are written by hand from the output of `python -m bench.cost_model`, which fits
# them anew at every run and compares; docs/cost-model.md has its figures.
_SPLIT_K_TIMINGS = (
    "fitted to the 8 published timings of CATLASS examples 12 and 52 (W8A8, 910B3, CANN 8.5.0)"
)
_COMMON: dict[str, tuple[float, str]] = {
    "l2_read_bytes_per_cycle": (110, "CANN 8.1 platform_config, l2_read_rate"),
    "l2_write_bytes_per_cycle": (86, "CANN 8.1 platform_config, l2_write_rate"),
    "vector_bytes_per_cycle": (64, "CANN 8.1 platform_config, ub_to_l2_rate"),
    "vector_lanes": (128, "CANN 8.1 platform_config, vec_calc_size"),
    "dequantize_instructions": (
        10,
        "counted in panguq's W4A16 kernel: 3 shifts, interleave, 2 casts, multiply in float32",
    ),
    "memory_unit_bytes": (
        512,
        "CATLASS matmul optimization guide: rows of a multiple of 512 B move fastest; a 640 B row "
        "took as long as a 1024 B one",
    ),
    "float32_macs_per_cycle": (
        1024,
        "assumed a quarter of float16's 4096; platform_config has no float32 entry",
    ),
    "vector_start_us": (1, "CATLASS example 102, cost of a kernel that also uses vector cores"),
    "vector_start_per_wave_us": (
        7,
        "CATLASS example 102, cost of a kernel that also uses vector cores: 7 us x blocks / cores",
    ),
    "launch_us": (13.25, _SPLIT_K_TIMINGS),
    "core_load_bytes_per_cycle": (93.9, _SPLIT_K_TIMINGS),
    "vendor_dequantize_bytes_per_cycle": (
        2.76,
        "fitted to 2 published W4A16 timings (group 32, m = 1, 910B1, CANN 9.0.0-beta.2, "
        "GPTQModel's Ascend notes)",
    ),
}


def _ascend(name: str, part: str, cores: int, clock_mhz: int, l2_mib: int, hbm: int) -> Target:
    file = f"CANN 8.1 platform_config, {part}.ini"
    hbm_source = (
        "comment in CANN's matmul_v3_base_tiling: 1.6 TB/s"
        if hbm == 1600
        else "third-party notes on 910B4; half of 910B1's 1.6 TB/s, as its memory is half"
    )
    values = _COMMON | {
        "cube_cores": (cores, file),
        "vector_cores": (2 * cores, file),
        "clock_mhz": (clock_mhz, file),
        "l2_mib": (l2_mib, file),
        "hbm_gb_per_s": (hbm, hbm_source),
    }
    constants = {
        key: Constant(values[key][0], unit, values[key][1]) for key, unit in ASCEND_UNITS.items()
    }
    return Target(name, {}, "ascend", MappingProxyType(constants))


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        CPU,
        _ascend("ascend910b1", "Ascend910B1", 24, 1850, 192, 1600),
        _ascend("ascend910b2", "Ascend910B2", 24, 1800, 192, 1600),
        _ascend("ascend910b3", "Ascend910B3", 20, 1800, 192, 1600),
        _ascend("ascend910b4", "Ascend910B4", 20, 1500, 96, 800),
    )
}


def find_target(name_or_path: str | Path) -> Target:
    """A built-in target by name, or the target in a YAML or JSON file.

    What ends in .yaml, .yml or .json, or contains a slash, is a file. Raises LoweringError: for a
    name that no target has, with the nearest; for a file that is damaged, naming the constant.
    """
    name = str(name_or_path)
    if name in TARGETS:
        return TARGETS[name]
    if isinstance(name_or_path, Path) or "/" in name or name.endswith((".yaml", ".yml", ".json")):
        from panguq.lowering.target_files import load_target

        return load_target(Path(name_or_path))
    raise LoweringError(f"unknown target {name!r}", did_you_mean(name, TARGETS, "targets"))


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
    _check_names(target.kernels, CPU.kernels if target.kind == "cpu" else {}, f"{source}: kernels")
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
