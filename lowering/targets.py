"""The targets that panguq knows by name: each number says where it comes from."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from panguq.errors import LoweringError
from panguq.lowering.target import ASCEND_UNITS, Constant, KernelCost, Target
from panguq.lowering.target_files import load_target
from panguq.suggest import did_you_mean

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
        return load_target(Path(name_or_path), reserved=[n for n in TARGETS if n != "cpu"])
    raise LoweringError(f"unknown target {name!r}", did_you_mean(name, TARGETS, "targets"))
