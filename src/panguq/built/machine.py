"""What built code depends on beside the graph: this processor, and the releases that made it."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from panguq.kernels.cpu.multiplying import multiplying_dtype


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """The features that the operating system names of this processor, sorted."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return tuple(sorted(set(named[0].split()))) if named else (platform.processor(),)


def machine_text() -> str:
    """The machine and the releases that code is built for, one a line."""
    capability = torch.backends.cpu.get_cpu_capability()
    releases = [f"{name} {version(name)}" for name in ("panguq", "torch")]
    dtype = str(multiplying_dtype())
    machine = [platform.machine(), capability, *cpu_features(), dtype]
    return "\n".join([*machine, *releases, _own_source()])


@functools.cache
def _own_source() -> str:
    """A digest of the files of this folder, which say what code is made."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.[cp][py]*")):
        found.update(path.read_bytes())
    return found.hexdigest()
