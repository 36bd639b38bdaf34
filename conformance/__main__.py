"""Run the conformance checks: python -m conformance [--environment DIR] [pytest's arguments].

The environment is made first. Each test file runs in a process of its own,
since torchair and torch_npu keep global state.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conformance.environment import ROOT, TORCH, Environment, Unavailable, make_environment

NO_TESTS = 5  # pytest's exit code where -k left nothing


def main() -> int:
    """Make the environment and run every test file; 0 if all pass or none can run here."""
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-npu")
    parser.add_argument("--torch", default=os.environ.get("TORCH", TORCH), help="as pip wants it")
    parser.add_argument("--files", nargs="*", default=[], help="test files, without test_ and .py")
    options, pytest_arguments = parser.parse_known_args()
    try:
        environment = make_environment(options.environment, options.torch)
    except Unavailable as reason:
        print(f"conformance with torch_npu skipped: {reason}")
        return 0
    jobs = [job for job in _jobs() if not options.files or job[0].stem[5:] in options.files]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
        passed = list(workers.map(lambda job: _passes(environment, job, pytest_arguments), jobs))
    print(f"conformance: {passed.count(True)} passed, {passed.count(False)} failed")
    return 0 if all(passed) else 1


def _jobs() -> list[tuple[Path, list[str]]]:
    """Test files with the tests to choose of them; the longest first, and in two halves."""
    files = sorted((ROOT / "conformance").glob("test_*.py"))
    graphs = ROOT / "conformance" / "test_graphs.py"
    halves = [(graphs, ["-k", "openpangu"]), (graphs, ["-k", "not openpangu"])]
    return [*halves, *((file, []) for file in files if file != graphs)]


def _passes(environment: Environment, job: tuple[Path, list[str]], arguments: list[str]) -> bool:
    file, choice = job
    command = [
        str(environment.python),
        "-m",
        "pytest",
        "--show-capture=no",
        str(file),
        *choice,
        *arguments,
    ]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment.variables(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    took = time.monotonic() - start
    print(f"== {file.name} {' '.join(choice)}: {took:.0f} s\n{done.stdout}", flush=True)
    return done.returncode in (0, NO_TESTS)


if __name__ == "__main__":
    sys.exit(main())
