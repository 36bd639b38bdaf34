"""The NPU as the self-test uses it: what is installed, whether it computes, how long calls take."""

from __future__ import annotations

import csv
import getpass
import io
import os
import platform
import re
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WARM_UP, CALLS = 3, 20
# What msprof's op_summary calls the columns of kernel_details, which torch_npu's profiler writes.
COLUMNS = {
    "Name": "Op Name",
    "Type": "OP Type",
    "Input Shapes": "Input Shapes",
    "Input Data Types": "Input Data Types",
    "Input Formats": "Input Formats",
    "Output Shapes": "Output Shapes",
    "Output Data Types": "Output Data Types",
    "Output Formats": "Output Formats",
    "Duration(us)": "Task Duration(us)",
}
_PACKAGES = ("panguq", "torch", "torch_npu", "triton-ascend", "transformers")
_VERSION = re.compile(r"(?:^|\n)\s*[Vv]ersion\s*[=:]\s*\[?([\w.+-]+)")


@dataclass(frozen=True)
class CallTime:
    """Microseconds of a call: `by` the device's own clock for each kernel ("profiler"), or from
    its start to its end as events saw it, which launching may dominate ("events")."""

    us: float
    by: str
    kernels: tuple[dict[str, str], ...] = ()


def versions() -> dict[str, str]:
    """What is installed; "not installed" or "not found" where something is not."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    home = os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest")
    found["cann"] = _version_in(sorted(Path(home).glob("*/ascend_toolkit_install.info")))
    found["driver"] = _version_in([Path("/usr/local/Ascend/driver/version.info")])
    return found


def _version_in(files: Iterable[Path]) -> str:
    for file in files:
        with suppress(OSError, UnicodeDecodeError):
            if version := _VERSION.search(file.read_text(encoding="utf-8")[:10_000]):
                return version[1]
    return "not found"


def computes(device: torch.device) -> bool:
    """Whether an addition on the device has the right result: on a stand-in nothing is computed."""
    values = torch.arange(64, dtype=torch.float32)
    return torch.equal((values.to(device) + 1).cpu(), values + 1)


def to_device(value: Any, device: torch.device) -> Any:
    """A call's arguments there; only tensors move."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return value


def brought_back(value: Any) -> list[Tensor | None]:
    """A call's results on the CPU."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [part.cpu() if isinstance(part, Tensor) else None for part in parts]


def time_call(
    run: Callable[[], Any],
    profiled: Callable[[Callable[[], Any]], list[dict[str, str]]] | None = None,
) -> CallTime | None:
    """The median of some calls; None where the device's clock stands still.

    profiled: `profile_call`, where a profiler works; what it cannot tell, events do.
    """
    for _ in range(WARM_UP):
        run()
    torch.npu.synchronize()  # type: ignore[attr-defined]
    if kernels := profiled(run) if profiled is not None else []:
        us = sum(float(kernel["Task Duration(us)"]) for kernel in kernels)
        return CallTime(us, "profiler", tuple(kernels))
    taken = []
    for _ in range(CALLS):
        start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))  # type: ignore[attr-defined]
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1000)
    us = statistics.median(taken)
    return CallTime(us, "events") if us > 0 else None


def profile_call(run: Callable[[], Any]) -> list[dict[str, str]]:
    """The kernels of one call, each with the median of its times, in the columns of op_summary."""
    import torch_npu  # type: ignore[import-not-found, import-untyped, unused-ignore]

    profiler = torch_npu.profiler
    with tempfile.TemporaryDirectory() as folder:
        with profiler.profile(
            activities=[profiler.ProfilerActivity.NPU],
            record_shapes=True,
            on_trace_ready=profiler.tensorboard_trace_handler(folder),
        ):
            for _ in range(CALLS):
                run()
            torch.npu.synchronize()  # type: ignore[attr-defined]
        files = sorted(Path(folder).glob("**/kernel_details.csv"))
        return kernels_of(files[0].read_text(encoding="utf-8"), CALLS) if files else []


def kernels_of(text: str, calls: int) -> list[dict[str, str]]:
    """The kernels of one call from a kernel_details table of `calls` equal ones, in their order.

    Empty where the table does not divide evenly, as when other work ran in between.
    """
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row.get("Duration(us)")]
    each, rest = divmod(len(rows), calls)
    if rest or not each:
        return []
    found = []
    for place in range(each):
        same = rows[place::each]
        if len({row["Type"] for row in same}) > 1:
            return []
        named = {new: same[0].get(old, "") for old, new in COLUMNS.items()}
        middle = statistics.median(float(row["Duration(us)"]) for row in same)
        found.append({**named, "Task Duration(us)": f"{middle:.2f}"})
    return found


def plain(text: str) -> str:
    """An error's first line without paths, names of users and of hosts."""
    first = text.strip().split("\n")[0][:300]
    first = re.sub(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\][^\s:;'\",)]*", "<path>", first)
    private = {"<user>": getpass.getuser(), "<host>": socket.gethostname()}
    for replacement, name in private.items():
        if len(name) > 2:
            first = re.sub(rf"\b{re.escape(name)}\b", replacement, first)
    return re.sub(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", "<address>", first)
