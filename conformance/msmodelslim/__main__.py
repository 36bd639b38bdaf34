"""Quantize small models with msModelSlim on a CPU and read them: python -m conformance.msmodelslim.

    python -m conformance.msmodelslim [--environment DIR] [pytest's arguments]

The environment is made first (about 1.5 GB on disk with torch); the checks run in the Python that
this was called with, which must have panguq and pytest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from conformance.environment import ROOT, TORCH, Unavailable
from conformance.msmodelslim.environment import Environment, make_environment, run

HERE = Path(__file__).parent
KINDS = (
    ("w8a8", "bfloat16"),
    ("w8a8", "float16"),
    ("w8a8_norm_bias", "bfloat16"),
    ("w8a8_dynamic", "bfloat16"),
    ("w8a16", "float16"),
    ("w4a8", "bfloat16"),
    ("v1", "bfloat16"),  # the newer command line; the others are its older calibrator's
    ("v1", "float16"),
)


def main() -> int:
    """Make what is missing and run the checks; 0 if all pass or none can run here."""
    parser = argparse.ArgumentParser(prog="python -m conformance.msmodelslim", description=__doc__)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-msmodelslim")
    parser.add_argument("--torch", default=os.environ.get("TORCH", TORCH), help="as pip wants it")
    options, arguments = parser.parse_known_args()
    try:
        environment = make_environment(options.environment, options.torch)
        _quantize(environment)
    except Unavailable as reason:
        print(f"conformance with msModelSlim skipped: {reason}")
        return 0
    variables = {
        **os.environ,
        "PANGUQ_MSMODELSLIM": str(environment.folders),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", f"--confcutdir={HERE}", "-rs"]
    command += [str(HERE / "test_folders.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


def _quantize(environment: Environment) -> None:
    for kind, dtype in KINDS:
        out = environment.folders / f"{kind}-{dtype}"
        if not (out / "config.json").exists():  # written last
            what = f"quantizing {kind} for {dtype} with msModelSlim"
            print(what, flush=True)
            script, kinds = ("quantize_v1.py", []) if kind == "v1" else ("quantize.py", [kind])
            run(what, str(environment.python), str(HERE / script), str(out), *kinds, dtype)


if __name__ == "__main__":
    sys.exit(main())
