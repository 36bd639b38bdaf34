"""What a quantizing process is told, and what it answers; runs in every peer's environment.

Nothing here imports panguq: a peer's Python has torch, transformers and safetensors only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.memory import PeakMemory, process_seconds

T = TypeVar("T")
WEIGHTS = "weights.safetensors"
FIGURES = "figures.json"


@dataclass(frozen=True)
class Job:
    """One run: the float model's folder, a file of token ids, a method, and where results go."""

    model: str
    tokens: str
    method: str
    group_size: int
    threads: int
    out: str

    @classmethod
    def from_command_line(cls) -> Job:
        """The job in the JSON file that is the only argument; torch computes on its threads."""
        job = cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        torch.set_num_threads(job.threads)
        return job

    def windows(self) -> Tensor:
        """The calibration tokens, int64 `[windows, seq]`."""
        return load_file(self.tokens)["calibration"]

    def load_model(self) -> Any:
        """The float model in float32, by transformers."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()


class Measurement:
    """Times and memory of the quantization itself; what comes after `quantize` is not counted."""

    def __init__(self, job: Job, packages: tuple[str, ...]) -> None:
        self.job = job
        names = ("torch", "transformers", *packages)
        self.figures: dict[str, Any] = {
            "versions": {name: importlib.metadata.version(name) for name in names}
        }

    def load(self, load: Callable[[], T]) -> T:
        """Call `load`, which reads the float model, and time it."""
        return self._timed("load_seconds", load)

    def quantize(self, quantize: Callable[[], T], options: Mapping[str, Any]) -> T:
        """Call `quantize`; its time, the process's age after it, and its peak of memory.

        Seconds are of the clock; CPU seconds are of all threads, which a busy machine changes less.
        """
        self.figures["options"] = dict(options)
        cpu_before = time.process_time()
        with PeakMemory() as peak:
            result = self._timed("quantize_seconds", quantize)
        self.figures["quantize_cpu_seconds"] = time.process_time() - cpu_before
        self.figures["process_seconds"] = process_seconds()
        self.figures["peak_resident_mib"] = peak.resident_mib
        self.figures["peak_anonymous_mib"] = peak.anonymous_mib
        return result

    def _timed(self, key: str, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = call()
        self.figures[key] = time.perf_counter() - started
        return result

    def write(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write dequantized weights, if given, in float32 under transformers' names, and figures.

        The figures come last and in one step: where they are, everything is.
        """
        out = Path(self.job.out)
        out.mkdir(parents=True, exist_ok=True)
        if weights is not None:
            plain = {n: t.detach().float().contiguous().clone() for n, t in weights.items()}
            save_file(plain, out / WEIGHTS)
        partial = out / f"{FIGURES}.partial"
        partial.write_text(json.dumps(self.figures, indent=2, default=str), encoding="utf-8")
        os.replace(partial, out / FIGURES)
