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
from conformance.servers.folders import Folder

LEAST_DB = 45.0
_FIGURES = {
    "logits": "to panguq's lowered graph",
    "served_logits": "to panguq's reading of the folder with the server's float inputs",
    "tp2_logits": "to panguq's reading of the folder with inputs shared by two devices",
}
TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Row:
    """A folder, on how many devices, and how near the logits have to be to those of panguq's
    lowered graph: None means equal, bit for bit. `why` says where less than LEAST_DB comes from."""

    folder: Folder
    least_db: float | None = LEAST_DB
    devices: int = 1
    quantization: str = "ascend"
    why: str = ""

    @property
    def name(self) -> str:
        """Model, recipe, format if it is not the usual one, and devices."""
        recipe = self.folder.recipe if isinstance(self.folder.recipe, str) else "own"
        parts = [self.folder.model, recipe, self.folder.dtype]
        parts += [] if self.folder.format == "ascend" else [self.folder.format]
        return "-".join(parts + ([f"tp{self.devices}"] if self.devices > 1 else []))


_AS_W4A16 = "the server computes W4A8 as W4A16: it leaves the inputs float"
_SCHEMES = ("w8a8-dynamic-serving", "w8a8-serving", "w8a16")
ROWS = (
    *(Row(Folder(model, recipe), None) for model in ("llama", "openpangu", "qwen2", "qwen3")
      for recipe in _SCHEMES),
    *(Row(Folder("openpangu", recipe, "float16"), None) for recipe in _SCHEMES),
    Row(Folder("llama", "w4a8"), why=_AS_W4A16),
    Row(Folder("qwen3-moe", "w8a8-dynamic-serving")),
    Row(Folder("llama", "w8a8-dynamic-serving"), devices=2),
    Row(Folder("openpangu", "w8a8-serving"), devices=2),
    Row(Folder("llama", "w8a8-dynamic-serving", format="compressed-tensors"), quantization="auto"),
)  # fmt: skip
SMOLLM2 = tuple(Row(Folder("smollm2", recipe), 30.0) for recipe in _SCHEMES)
TINY = "llama-w8a8-dynamic-serving-bfloat16"
"""The one row of `make conformance`."""


def run(
    server: NpuServer, rows: Sequence[tuple[Row, Path]]
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """What the server says of each row's folder, in the order in which it is done: the first
    device's answer, and under `devices` all where there are several."""
    together: dict[tuple[int, str, bool], list[tuple[Row, Path]]] = {}
    for row, folder in rows:  # a process makes groups of devices for experts, or it does not
        key = (row.devices, row.quantization, row.folder.model.endswith("moe"))
        together.setdefault(key, []).append((row, folder))
    for (devices, quantization, _), chosen in together.items():
        answers = _answers(server, [folder for _, folder in chosen], devices, quantization)
        for (row, _), said in zip(chosen, answers, strict=True):
            yield row, {**said[0], **({"devices": said} if devices > 1 else {})}


def _answers(
    server: NpuServer, folders: Sequence[Path], devices: int, quantization: str
) -> list[list[dict[str, Any]]]:
    """The answers of every device of one server to each of these folders."""
    port = _free_port()
    processes = [
        subprocess.Popen(
            [
                str(server.python), "-m", "conformance.servers.npu.compare",
                *map(str, folders), "--quantization", quantization,
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
        for name in ("missing", "refused"):
            if answer[name]:
                yield f"{where}{name}: {_some(answer[name])}"
        left = [name for name in answer["left_over"] if name != TIED_HEAD]
        if left:
            yield f"{where}left over: {_some(left)}"
        if answer["lossy"]:
            yield f"{where}converted with loss: {answer['lossy']}"
        near = next(answer[name] for name in reversed(_FIGURES) if name in answer)
        if row.least_db is None and not near["equal"]:
            yield f"{where}logits are {near['db']:.1f} dB from panguq's, not equal"
        elif row.least_db is not None and not (near["equal"] or near["db"] >= row.least_db):
            yield f"{where}logits are {near['db']:.1f} dB from panguq's, not {row.least_db:g}"


def text(said: dict[str, Any]) -> str:
    """A folder's result in one line."""
    if "error" in said:
        return str(said["error"])
    how = "; ".join(_nearness(name, said[name]) for name in _FIGURES if name in said)
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
