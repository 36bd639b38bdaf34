"""Run the kernel checks: python -m conformance.triton [--environment DIR] [pytest's arguments].

The environment is made first (700 MB on disk with torch; Python 3.10 or 3.11).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from conformance.environment import ROOT, TORCH, Unavailable
from conformance.triton.environment import make_environment, make_mlir

HERE = Path(__file__).parent


def main() -> int:
    """Run every test file in a process of its own; 0 if all pass or none can run here."""
    parser = argparse.ArgumentParser(prog="python -m conformance.triton", description=__doc__)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-triton")
    parser.add_argument("--torch", default=os.environ.get("TORCH", TORCH), help="as pip wants it")
    options, arguments = parser.parse_known_args()
    try:
        environment = make_environment(options.environment, options.torch)
    except Unavailable as reason:
        print(f"conformance of the Triton kernels skipped: {reason}")
        return 0
    try:
        make_mlir(environment)
    except Unavailable as reason:
        print(f"MLIR 19 is missing, so kernels are not run as native code: {reason}")
    failed = []
    # The interpreter is chosen where a kernel is defined, so it has a process of its own.
    for file in sorted(HERE.glob("test_*.py")):
        print(f"== {file.name}", flush=True)
        command = [str(environment.python), "-m", "pytest", f"--confcutdir={HERE}", "-rs"]
        done = subprocess.run(
            [*command, str(file), *arguments], cwd=ROOT, env=environment.variables()
        )
        if done.returncode != 0:
            failed.append(file.name)
    print(
        "conformance of the Triton kernels:", f"failed: {' '.join(failed)}" if failed else "passed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
