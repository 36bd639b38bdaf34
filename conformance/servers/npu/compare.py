"""Load folders in vllm-ascend and compare: python -m conformance.servers.npu.compare FOLDER ...

FOLDER/checkpoint is what panguq wrote, FOLDER/reference.safetensors holds `ids` and what panguq
computes for them (`conformance.servers.folders`). Prints one JSON object for each folder.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conformance.servers.npu import substitutes

substitutes.install()

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from conformance.servers.npu import engine  # noqa: E402


class CountedCalls(TorchDispatchMode):
    """Counts the calls of NPU ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("npu", "_C_ascend"):
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Load, compare and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--port", type=int, default=29600)
    parser.add_argument("--quantization", default="ascend", help="or auto: as config.json says")
    parser.add_argument("--only-load", action="store_true", help="compute nothing")
    options = parser.parse_args()
    process = engine.Process(options.rank, options.world, options.port)
    for folder in options.folders:
        try:
            said = compare(folder, options.quantization, process, options.only_load)
        except Exception as error:  # whatever a server raises is the answer
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
            said = {"error": f"{type(error).__name__}: {str(error)[:400]}", "where": where}
        print("RESULT " + json.dumps({"folder": folder.name, **said}), flush=True)


def compare(
    folder: Path, quantization: str, process: engine.Process, only_load: bool = False
) -> dict[str, Any]:
    """What the server made of the checkpoint, and how near its logits are to panguq's, which are
    left out with `only_load`."""
    wanted = load_file(folder / "reference.safetensors")
    dtype = str(wanted["logits"].dtype).removeprefix("torch.")
    with engine.server_config(folder / "checkpoint", dtype, quantization, process) as config:
        substitutes.install_attention()
        model = engine.build(config)
        said: dict[str, Any] = {"model": type(model).__name__, "schemes": engine.schemes(model)}
        said |= asdict(engine.place(model, folder / "checkpoint"))
        engine.load(model, config)
        if only_load:
            return said
        with CountedCalls() as counted:
            logits = engine.logits(model, config, wanted["ids"])
    said["calls"] = dict(counted.calls)
    if process.rank == 0:
        save_file({"logits": logits}, folder / "server.safetensors")
    others = {"tp2_logits"} if process.world == 2 else {"served_logits"}
    for name in wanted.keys() & {"logits", *others}:
        said[name] = nearness(logits, wanted[name].float())
    said["reference"] = {
        name: nearness(wanted[name].float(), wanted["logits"].float())
        for name in wanted.keys() & {"served_logits", "tp2_logits"}
    }
    return said


def nearness(found: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Whether two tensors of logits are equal, else how near they are."""
    noise = (found - wanted).double().square().sum()
    return {
        "equal": bool(torch.equal(found, wanted)),
        "db": float(10 * torch.log10(wanted.double().square().sum() / noise)) if noise else None,
        "top1": float((found.argmax(-1) == wanted.argmax(-1)).double().mean()),
    }


if __name__ == "__main__":
    main()
