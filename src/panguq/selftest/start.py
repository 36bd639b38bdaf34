"""The start of a self-test: a device, or one sentence about what is missing."""

from __future__ import annotations

import re
from typing import Any

import torch

from panguq.errors import LoweringError
from panguq.kernels.ascend.device import load_torch_npu, require_device
from panguq.selftest.device import computes, plain, versions


def start(device: str, target: str | None) -> tuple[Any, dict[str, Any]]:
    """The session on this device, and what the report begins with.

    device: "npu" or "npu:N". target: whose costs times are compared with; None: that of the
    device's name. Raises LoweringError where there is no such device, or no target for it.
    """
    found = re.fullmatch(r"npu(?::(\d{1,3}))?", device)
    if found is None:
        raise LoweringError(f"{device[:40]!r} is no NPU", "the devices are npu:0, npu:1, ...")
    load_torch_npu()
    require_device()
    npu = torch.npu  # type: ignore[attr-defined]
    number, there = int(found[1] or 0), int(npu.device_count())
    if number >= there:
        raise LoweringError(
            f"there is no npu:{number}: torch_npu sees {there}", "`npu-smi info` lists them"
        )
    name = str(npu.get_device_name(number))
    # Only now, since panguq's ops must be defined after torch_npu's.
    from panguq.lowering.targets import find_target
    from panguq.selftest.run import Session

    chosen = find_target(target or _target_of(name))
    npu.set_device(number)
    place = torch.device("npu", number)
    judged = computes(place)
    begin = {
        "versions": versions(),
        "device": plain(name),
        "target": chosen.name,
        "stand_in": not judged,
    }
    return Session(place, chosen, judged, []), begin


def _target_of(name: str) -> str:
    found = re.match(r"ascend\s*910_?b([1-4])", name.lower())
    if found is None:
        raise LoweringError(
            f"no target is known for {plain(name)!r}", "name the nearest one: --target ascend910b2"
        )
    return f"ascend910b{found[1]}"
