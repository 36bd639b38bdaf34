"""The virtual environment of msModelSlim, which wants another transformers than panguq."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conformance.environment import ROOT, TORCH, Unavailable

PINNED = ("transformers==4.57.1", "msmodelslim==26.1.0")


@dataclass(frozen=True)
class Environment:
    """A folder with the virtual environment and, in `folders`, what msModelSlim wrote."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter that has msModelSlim."""
        return self.folder / "bin" / "python"

    @property
    def folders(self) -> Path:
        """Where the quantized models are."""
        return self.folder / "folders"


def make_environment(folder: Path, torch: str = TORCH) -> Environment:
    """Make the environment unless it is there. Raises Unavailable, saying what it lacks."""
    environment = Environment(folder.absolute())
    ready = environment.folder / ".ready"
    wanted = "\n".join((torch, *PINNED))
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return environment
    print(f"making {environment.folder} with {torch} and {' and '.join(PINNED)}", flush=True)
    shutil.rmtree(environment.folder, ignore_errors=True)
    run("creating a virtual environment", sys.executable, "-m", "venv", str(environment.folder))
    pip = (str(environment.python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(f"installing {torch}", *pip, *torch.split())
    run(f"installing {' and '.join(PINNED)}", *pip, *PINNED)
    ready.write_text(wanted, encoding="utf-8")
    return environment


def run(what: str, *command: str) -> None:
    """Run a command from the repository's root. Raises Unavailable with what it printed."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"{what} failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")
