"""Run panguq's Triton kernels on a CUDA GPU: python -m conformance.gpu [--out FILE] [--minutes N].

An NPU's kernels, but not an NPU: what is found says nothing of an NPU's speed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from conformance.environment import ROOT

RESULT = ROOT / "build" / "conformance_gpu.json"
ASSUMED_MHZ = 1500  # where torch does not say a GPU's clock; the fit makes up for it
WHAT = "panguq's Triton kernels on a CUDA GPU; no NPU took part, and no time is an NPU's"


def unavailable() -> str | None:
    """Why the kernels cannot run here; None if they can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def main() -> int:
    """0 if every number is right or nothing can run here."""
    parser = argparse.ArgumentParser(prog="python -m conformance.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--minutes", type=float, default=4.5, help="timing ends after so many")
    options = parser.parse_args()
    if (reason := unavailable()) is not None:
        print(f"conformance of the Triton kernels on a GPU skipped: {reason}")
        return 0
    end = time.monotonic() + 60 * options.minutes
    found = run(lambda: time.monotonic() > end)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    faults = [check for check in found["numerics"] if check["fault"]]
    for check in faults:
        print(f"{check['name']}: {check['fault']}")
    if choice := found.get("choice"):
        print(
            f"the faster schedule of {choice['judged_on']} shapes, by a model fitted to "
            f"{choice['fitted_to']} others: right {choice['right']} times, at most "
            f"{choice['largest_regret']:.0%} slower; a GPU's, not an NPU's"
        )
    print(f"{len(found['numerics'])} checks, {len(faults)} faults; {options.out} has all")
    return 1 if faults else 0


def run(ends: Callable[[], bool]) -> dict[str, Any]:
    """Numbers first, then times until `ends`."""
    import triton
    from triton.testing import do_bench_cudagraph

    from conformance.gpu.choice import gpu_target, judge
    from conformance.gpu.numerics import checks
    from conformance.gpu.schedules import time_grid

    gpu = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "what": WHAT,
        "gpu": gpu.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numerics": [asdict(check) for check in checks()],
        "times": "microseconds in a CUDA graph, weights in L2 where they fit; Split-K's contain "
        "clearing its flags",
    }
    with torch.cuda.stream(torch.cuda.Stream()):
        rows = time_grid(lambda call: 1000 * do_bench_cudagraph(call, rep=5), ends)
    found["schedules"] = [{**asdict(row), "gain": row.gain} for row in rows]
    if rows:
        found["gain"] = {"median": median(row.gain for row in rows), "rows": len(rows)}
        clock_mhz = getattr(gpu, "clock_rate", 0) / 1000 or ASSUMED_MHZ
        start = gpu_target(gpu.multi_processor_count, clock_mhz, gpu.L2_cache_size)
        found["choice"] = judge(rows, start)
    return found


if __name__ == "__main__":
    sys.exit(main())
