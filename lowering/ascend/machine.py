"""An NPU as data: its chip, and the constants that its kernels' costs are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.chip import Chip
from panguq.lowering.target import Target

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
        "arrival_cycles": "cycles",
        "memory_unit_bytes": "B",
        "float32_macs_per_cycle": "MAC/cycle/cube core",
        "vector_start_us": "us",
        "vector_start_per_wave_us": "us",
        "launch_us": "us",
        "core_load_bytes_per_cycle": "B/cycle/cube core",
        "vendor_dequantize_bytes_per_cycle": "B/cycle/vector core",
        "float_memory_gb_per_s": "GB/s",
        "int8_memory_gb_per_s": "GB/s",
        "float_start_us": "us",
        "int8_start_us": "us",
        "int8_load_start_us": "us/1024 of k",
        "float_exposed": "share",
        "int8_exposed": "share",
        "int8_load_bytes_per_cycle": "B/cycle/cube core",
        "epilogue_cycles": "cycles/output/vector core",
        "unaligned_cube": "times",
        "w8a16_start_us": "us",
        "w8a16_load_start_us": "us/1024 of k",
        "w8a16_memory_gb_per_s": "GB/s",
        "w8a16_dequantize_bytes_per_cycle": "B/cycle/vector core",
        "w8a16_bfloat16_times": "times",
        "w8a16_sum_cycles": "cycles/output/vector core",
    }
)
"""All constants of an Ascend target and their units. A target file must give every one."""


@dataclass(frozen=True)
class AscendMachine(Target):
    """What candidates, choices and costs read of an Ascend target; `AscendTarget` is the rest."""

    chip: Chip = ATLAS_A2

    units = ASCEND_UNITS
    whole = ("cube_cores", "vector_cores", "vector_lanes")

    @property
    def kind(self) -> str:
        return self.chip.kind
