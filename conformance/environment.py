"""The virtual environment of the conformance checks: torch, the real torch_npu, and stand-ins.

torch_npu needs an environment of its own: where it is installed, `import torch` loads it, and that
fails without CANN. It is pinned, since golden files hold what this version does.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from conformance.versions.requirements import constraints_without, requirements

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"
TORCH_NPU = "torch_npu==2.13.0"
# What torch_npu and torchair import, whether they ask for it or not; then what the checks use.
EXTRA = ("numpy", "pyyaml", "packaging", "protobuf")
TESTING = ("pytest", "hypothesis")
TOOLS = ("g++", "nm", "readelf")


class Unavailable(Exception):
    """What the checks need and this machine cannot have; the message says what."""


@dataclass(frozen=True)
class Environment:
    """A folder with the virtual environment and the stand-in libraries."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter that has torch_npu."""
        return self.folder / "bin" / "python"

    @property
    def libraries(self) -> Path:
        """The stand-in libraries."""
        return self.folder / "stand-ins"

    def variables(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Environment variables under which torch_npu imports and calls ops one after another."""
        return {
            **base,
            "LD_LIBRARY_PATH": str(self.libraries),
            # torch must not load torch_npu by itself: the checks import it when they want it.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            # Ops call their aclnn entry at once, in this thread, so that records come in order.
            "TASK_QUEUE_ENABLE": "0",
            "OMP_NUM_THREADS": "1",
        }


def make_environment(folder: Path, torch: str = TORCH) -> Environment:
    """Make the environment, or what is missing of it.

    torch: how pip is to be asked for torch, options included. Raises Unavailable for what this
    machine cannot have, RuntimeError if the stand-ins, which are panguq's own, do not compile.
    """
    environment = Environment(folder.absolute())
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if tools:
        raise Unavailable(f"{', '.join(tools)} is not installed (Debian: apt install g++)")
    packages = repr((torch, TORCH_NPU, EXTRA, TESTING, _panguq_needs(), _pins())).encode()
    _once(environment, "packages", packages, lambda: _install(environment, torch))
    sources = sorted((ROOT / "conformance" / "stand_ins").iterdir())
    code = b"".join(source.read_bytes() for source in sources if source.is_file())
    _once(environment, "stand-ins", code, lambda: _build(environment))
    return environment


def _install(environment: Environment, torch: str) -> None:
    print(f"making {environment.folder} with {torch} and {TORCH_NPU}", flush=True)
    shutil.rmtree(environment.folder, ignore_errors=True)
    _run("creating a virtual environment", sys.executable, "-m", "venv", str(environment.folder))
    pip = (str(environment.python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    _run(f"installing {torch}", *pip, *torch.split())
    # Its own wheel wants exactly this torch, but not under every name that torch is built.
    _run(f"installing {TORCH_NPU}", *pip, "--no-deps", TORCH_NPU)
    pins = environment.folder / "constraints.txt"
    pins.write_text(_pins(), encoding="utf-8")
    packages = (*EXTRA, *TESTING, *_panguq_needs())
    _run("installing what panguq needs", *pip, "-c", str(pins), *packages)
    _run("installing panguq", *pip, "--no-deps", "-e", str(ROOT))


def _panguq_needs() -> list[str]:
    """panguq's own dependencies, without torch, which is there already and must not change."""
    return [need.name for need in requirements() if need.name != "torch"]


def _pins() -> str:
    """The releases that panguq was tested with."""
    return constraints_without(["torch"])


def _build(environment: Environment) -> None:
    command = (str(environment.python), "-m", "conformance.stand_ins.build")
    errors = _errors_of(*command, str(environment.libraries))
    if errors is not None:
        raise RuntimeError(f"the stand-in libraries cannot be built:\n{errors}")


def _run(what: str, *command: str) -> None:
    errors = _errors_of(*command)
    if errors is not None:
        raise Unavailable(f"{what} failed:\n{errors}")


def _errors_of(*command: str) -> str | None:
    """What a command that failed said; None if it did not fail."""
    variables = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    return done.stderr.strip()[-2000:] if done.returncode != 0 else None


def _once(environment: Environment, name: str, made_of: bytes, make: Callable[[], None]) -> None:
    """Call `make` unless this part was made of the same before."""
    stamp = environment.folder / f".{name}"
    fingerprint = hashlib.sha256(made_of).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == fingerprint:
        return
    make()
    stamp.write_text(fingerprint, encoding="utf-8")
