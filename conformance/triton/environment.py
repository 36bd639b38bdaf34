"""The virtual environment of the kernel checks: triton-ascend, AscendNPU IR's compiler, stock MLIR.

triton-ascend needs an environment of its own: it installs a package `triton` over any other one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conformance.environment import ROOT, TORCH, Unavailable

# Whole packages whose own requirements are for machines with CANN.
PINNED = ("triton-ascend==3.2.0", "ascendnpu-ir==1.2.0")
# triton-ascend's interpreter fails with numpy 2.
NEEDED = ("numpy<2", "pybind11", "pytest>=8", "hypothesis>=6.100")
# MLIR of the LLVM release that triton-ascend is made from.
DEBIAN_PACKAGES = ("mlir-19-tools", "libmlir-19", "libllvm19", "llvm-19")


@dataclass(frozen=True)
class Environment:
    """A folder with the virtual environment and, in `mlir19`, Debian's MLIR 19."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter that has triton-ascend."""
        return self.folder / "bin" / "python"

    @property
    def mlir(self) -> Path:
        """Where the Debian packages are unpacked."""
        return self.folder / "mlir19"

    def variables(self) -> dict[str, str]:
        """Environment variables of the checks."""
        return {**os.environ, "PANGUQ_MLIR": str(self.mlir), "OMP_NUM_THREADS": "1"}


def make_environment(folder: Path, torch: str = TORCH) -> Environment:
    """Make the environment unless it is there. Raises Unavailable, saying what it lacks."""
    environment = Environment(folder.absolute())
    ready = environment.folder / ".ready"
    wanted = "\n".join((torch, *PINNED, *NEEDED))
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return environment
    print(f"making {environment.folder} with {torch}, {' and '.join(PINNED)}", flush=True)
    shutil.rmtree(environment.folder, ignore_errors=True)
    _run("creating a virtual environment", sys.executable, "-m", "venv", str(environment.folder))
    pip = (str(environment.python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    _run(f"installing {torch}", *pip, *torch.split(), *NEEDED)
    _run(f"installing {' and '.join(PINNED)}", *pip, "--no-deps", *PINNED)
    _run("installing panguq", *pip, "--no-deps", "-e", str(ROOT))
    ready.write_text(wanted, encoding="utf-8")
    return environment


def make_mlir(environment: Environment) -> None:
    """Unpack Debian's MLIR 19 unless it is there; nothing is installed. Raises Unavailable."""
    ready = environment.mlir / ".ready"
    if ready.exists():
        return
    tools = [tool for tool in ("apt-get", "dpkg", "cc") if shutil.which(tool) is None]
    if tools:
        raise Unavailable(f"{', '.join(tools)} is not installed")
    shutil.rmtree(environment.mlir, ignore_errors=True)
    packages = environment.mlir / "packages"
    packages.mkdir(parents=True)
    print(f"unpacking {' '.join(DEBIAN_PACKAGES)} (104 MB) into {environment.mlir}", flush=True)
    _run("downloading MLIR 19", "apt-get", "download", *DEBIAN_PACKAGES, folder=packages)
    for package in sorted(packages.glob("*.deb")):
        _run(f"unpacking {package.name}", "dpkg", "-x", str(package), str(environment.mlir))
    shutil.rmtree(packages)
    ready.touch()


def _run(what: str, *command: str, folder: Path = ROOT) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"{what} failed:\n{done.stderr.strip()[-2000:]}")
