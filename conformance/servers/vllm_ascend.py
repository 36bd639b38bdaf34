"""Folders in vllm-ascend's loader and layers: which ones, and what has to come out."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.environment import ROOT
from conformance.servers.environment import NpuServer
from conformance.servers.folders import W4A8, Folder

LEAST_DB = 45.0
BFLOAT16_DB = 35.0
"""Of W4A8 in bfloat16, where the server rounds the product of two scales and panguq's graph one
scale. That this is all of the difference is what the row in float16 says, held to `LEAST_DB`."""
NOISE_DB = 1.0
"""Two devices quantize halves of a token by scales of their own. The server's logits may be so much
farther from the lowered graph's than those of panguq's reading of the folder that does the same."""
_FIGURES = {
    "logits": "to panguq's lowered graph",
    "served_logits": "to panguq's graph of the same codes with float inputs",
    "tp2_logits": "to panguq's reading of the folder with inputs shared by two devices",
}
TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Row:
    """A folder, on how many devices, and how near the logits have to be to those of panguq's
    lowered graph: None means equal, bit for bit. `why` says where a difference comes from.
    `only_loads`: nothing is computed. `unset`: the end of parameters that no tensor is for."""

    folder: Folder
    least_db: float | None = LEAST_DB
    devices: int = 1
    quantization: str = "ascend"
    why: str = ""
    only_loads: bool = False
    unset: str = ""

    @property
    def name(self) -> str:
        """Model, recipe, format if it is not the usual one, and devices."""
        given = self.folder.recipe
        recipe = given if isinstance(given, str) else str(given["name"])
        parts = [self.folder.model, recipe, self.folder.dtype]
        parts += [] if self.folder.format == "ascend" else [self.folder.format]
        return "-".join(parts + ([f"tp{self.devices}"] if self.devices > 1 else []))


_AS_W4A16 = "the server computes W4A8 as W4A16: it leaves the inputs float"
_COMPILED_OPS = "its experts call ops of vllm-ascend's compiled part, which is not built here"
_SCHEMES = ("w8a8-dynamic-serving", "w8a8-serving", "w8a16")
ROWS = (
    *(Row(Folder(model, recipe), None) for model in ("llama", "openpangu", "qwen2", "qwen3")
      for recipe in _SCHEMES),
    *(Row(Folder("openpangu", recipe, "float16"), None) for recipe in _SCHEMES),
    Row(Folder("llama", W4A8), BFLOAT16_DB, why=_AS_W4A16),
    Row(Folder("llama", W4A8, "float16"), why=_AS_W4A16),
    Row(Folder("qwen3-moe", "w8a8-dynamic-serving"), only_loads=True, why=_COMPILED_OPS),
    Row(Folder("llama", "w8a8-dynamic-serving"), devices=2),
    Row(Folder("openpangu", "w8a8-serving"), devices=2),
    Row(Folder("llama", "w8a8-dynamic-serving", format="compressed-tensors"), None,
        quantization="auto", unset="weight_offset"),
)  # fmt: skip
SMOLLM2 = tuple(Row(Folder("smollm2", recipe), 30.0) for recipe in _SCHEMES)
TINY = "llama-w8a8-dynamic-serving-bfloat16"
"""The row to try first: a folder of W8A8_DYNAMIC, two minutes."""


def run(
    server: NpuServer, rows: Sequence[tuple[Row, Path]]
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """What the server says of each row's folder, in the order in which it is done: the first
    device's answer, and under `devices` all where there are several."""
    together: dict[tuple[int, str, bool, bool], list[tuple[Row, Path]]] = {}
    for row, folder in rows:  # a process makes groups of devices for experts, or it does not
        has_experts = row.folder.model.endswith("moe")
        key = (row.devices, row.quantization, row.only_loads, has_experts)
        together.setdefault(key, []).append((row, folder))
    for (devices, quantization, only_loads, _), chosen in together.items():
        options = ["--quantization", quantization, *(["--only-load"] if only_loads else [])]
        answers = _answers(server, [folder for _, folder in chosen], devices, options)
        for (row, _), said in zip(chosen, answers, strict=True):
            yield row, {**said[0], **({"devices": said} if devices > 1 else {})}


def _answers(
    server: NpuServer, folders: Sequence[Path], devices: int, options: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """The answers of every device of one server to each of these folders."""
    port = _free_port()
    processes = [
        subprocess.Popen(
            [
                str(server.python), "-m", "conformance.servers.npu.compare",
                *map(str, folders), *options,
                "--rank", str(rank), "--world", str(devices), "--port", str(port),
            ],
            cwd=ROOT, env=server.variables(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(devices)
    ]  # fmt: skip
    of_devices = []
    for out, errors in [process.communicate() for process in processes]:
        lines = [line[7:] for line in out.splitlines() if line.startswith("RESULT ")]
        silent = {"error": f"it ended without an answer: {errors.strip()[-600:]}"}
        missing = len(folders) - len(lines)
        of_devices.append([*map(json.loads, lines), *([silent] * missing)])
    return [list(answers) for answers in zip(*of_devices, strict=True)]


def problems(row: Row, said: dict[str, Any]) -> Iterator[str]:
    """What is wrong; nothing if the server took the folder as it should."""
    for rank, answer in enumerate(said.get("devices", [said])):
        where = f"device {rank}: " if row.devices > 1 else ""
        if "error" in answer:
            yield f"{where}{answer['error']} {answer.get('where', '')}"
            continue
        missing = [n for n in answer["missing"] if not (row.unset and n.endswith(row.unset))]
        for what, names in (("missing", missing), ("refused", answer["refused"])):
            if names:
                yield f"{where}{what}: {_some(names)}"
        left = [name for name in answer["left_over"] if name != TIED_HEAD]
        if left:
            yield f"{where}left over: {_some(left)}"
        if answer["lossy"]:
            yield f"{where}converted with loss: {answer['lossy']}"
        if row.only_loads:
            continue
        near = answer.get("served_logits", answer["logits"])
        least_db = row.least_db
        if row.devices > 1 and "tp2_logits" in answer["reference"]:
            least_db = answer["reference"]["tp2_logits"]["db"] - NOISE_DB
        if least_db is None and not near["equal"]:
            yield f"{where}logits are {near['db']:.1f} dB from panguq's, not equal"
        elif least_db is not None and not (near["equal"] or near["db"] >= least_db):
            yield f"{where}logits are {near['db']:.1f} dB from panguq's, not {least_db:.1f}"


def text(said: dict[str, Any]) -> str:
    """A folder's result in one line."""
    if "error" in said:
        return str(said["error"])
    figures = [_nearness(name, said[name]) for name in _FIGURES if name in said]
    how = "; ".join(figures) or "nothing computed"
    return (
        f"{said['tensors']} tensors, {len(said['left_over'])} left over, "
        f"{len(said['missing'])} of {said['parameters']} parameters missing, {how}"
    )


def _nearness(name: str, near: dict[str, Any]) -> str:
    how = "equal" if near["equal"] else f"{near['db']:.1f} dB"
    return f"{_FIGURES[name]} {how}, top-1 {near['top1']:.1%}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
