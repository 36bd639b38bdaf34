"""The virtual environment of GPTQModel, whose metadata asks for the newest torch, with CUDA, and
for packages that only other methods import; it is pure Python and runs on the torch that is there.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from conformance.environment import TORCH
from conformance.msmodelslim.environment import run

PACKAGES = (
    "transformers==5.23.0", "accelerate", "safetensors", "numpy", "threadpoolctl", "packaging",
    "protobuf", "pillow", "requests", "datasets", "pyarrow", "dill", "jinja2",
)  # fmt: skip
WITHOUT_DEPENDENCIES = (
    "gptqmodel==7.7.0", "device-smi==0.5.7", "pypcre==0.6.4", "tokenicer==0.0.14",
    "logbar==0.4.15", "defuser==0.0.28", "torchao==0.18.0", "optimum==2.3.0",
)  # fmt: skip


def make_environment(folder: Path, torch: str = TORCH) -> Path:
    """The environment's Python; it is made unless it is there, complete and of these pins.

    Raises Unavailable for what cannot be installed here.
    """
    folder = folder.absolute()
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = "\n".join((torch, *PACKAGES, *WITHOUT_DEPENDENCIES))
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {folder} with {torch} and {WITHOUT_DEPENDENCIES[0]}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    run("creating a virtual environment", sys.executable, "-m", "venv", str(folder))
    pip = (str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(f"installing {torch}", *pip, *torch.split())
    run("installing what GPTQModel needs", *pip, *PACKAGES)
    run("installing GPTQModel", *pip, "--no-deps", *WITHOUT_DEPENDENCIES)
    ready.write_text(wanted, encoding="utf-8")
    return python
