"""A virtual environment with the older pair of releases, apart from panguq's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("transformers==4.57.6", "compressed-tensors==0.13.0", "accelerate>=1", "numpy")


class Unavailable(Exception):
    """The environment cannot be had here; the message says why."""


def make_environment(folder: Path, torch: str) -> Path:
    """The environment's Python, made once. Raises Unavailable without the packages."""
    python = folder.absolute() / "bin" / "python"
    wanted = "\n".join((torch, *PACKAGES))
    stamp = folder / ".packages"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {folder} with {torch}, {', '.join(PACKAGES[:2])}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run("creating a virtual environment", sys.executable, "-m", "venv", str(folder))
    pip = (str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    _run(f"installing {torch}", *pip, torch)
    _run(f"installing {' '.join(PACKAGES)}", *pip, *PACKAGES)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _run(what: str, *command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"{what} failed:\n{done.stderr.strip()[-1000:]}")
