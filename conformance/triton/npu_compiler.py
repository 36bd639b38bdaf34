"""AscendNPU IR's compiler up to its memory plan: does a kernel fit UB, L1 and L0C of a target?

The last step would call `hivmc`, which is part of CANN, to write machine code. A script of that
name stands in, which copies what it is given, so that the compiler ends with success where all that
it does itself succeeded, and its last text can be read (`hivm.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Those that triton-ascend 3.2.0 gives for an Atlas A2.
OPTIONS = (
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
    "--enable-auto-multi-buffer=True",
    "--enable-auto-bind-sub-block=True",
)
_STAND_IN = """#!/bin/sh
# Stands in for CANN's hivmc: its input becomes the output file that the compiler asks for.
source=$1
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then cp "$source" "$2"; fi
    shift
done
"""
_MEMORIES = {"ub": "ub", "cbuf": "l1", "cc": "l0c", "ca": "l0a", "cb": "l0b"}


@dataclass(frozen=True)
class Verdict:
    """What the compiler said of a kernel.

    `compiles` also where it first had to give up double buffering, which `double_buffered` tells.
    `overflow` is the memory that was too small, with the bytes it would need in `required`.
    `lowered` is what `hivmc` would be given.
    """

    compiles: bool
    double_buffered: bool
    overflow: str | None
    required: int | None
    message: str
    lowered: str = ""


def compiler_path() -> Path | None:
    """bishengir-compile of the package ascendnpu-ir; None if that is not installed."""
    spec = find_spec("ascendnpuir")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "bin" / "bishengir-compile"


def compile_linalg(text: str, target: str, folder: Path, name: str) -> Verdict:
    """Compile this module in `folder`, for instance for Ascend910B1."""
    compiler = compiler_path()
    assert compiler is not None
    tools = folder / "tools"
    tools.mkdir(parents=True, exist_ok=True)
    stand_in = tools / "hivmc"
    if not stand_in.exists():
        stand_in.write_text(_STAND_IN, encoding="utf-8")
        stand_in.chmod(0o755)
    source = folder / f"{name}-{target}.mlir"
    source.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [str(compiler), str(source), f"--target={target}", *OPTIONS, "-o", str(source) + ".o"],
        env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    made = Path(str(source) + ".o")
    lowered = made.read_text(encoding="utf-8") if done.returncode == 0 else ""
    return _verdict(done.returncode, done.stdout + done.stderr, lowered)


def _verdict(code: int, output: str, lowered: str) -> Verdict:
    overflow = re.search(r"(\w+) overflow, requires (\d+) bits", output)
    given_up = "set enable-auto-multi-buffer to false" in output
    return Verdict(
        compiles=code == 0,
        double_buffered=code == 0 and not given_up,
        overflow=_MEMORIES.get(overflow[1].lower(), overflow[1]) if overflow else None,
        required=int(overflow[2]) // 8 if overflow else None,
        message="" if code == 0 else output.strip()[-500:],
        lowered=lowered,
    )
