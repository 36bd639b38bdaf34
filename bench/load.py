"""A compiled model under load, in one process: the same results, no growth, no deadlock.

    python -m bench.load [FOLDER] [--generates 500] [--threads 8] [--json FILE]

FOLDER is what `CompiledModel.save` wrote; without one, SmolLM2 is compiled with `w8a8-dynamic`
first. Every figure is printed. The exit status is 1 if a result differed, a thread did not end, or
memory or open files grew beyond what the first tenth of the calls took.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

import panguq
from bench.memory import status_mib
from panguq.tensors.memory import release_free_memory

KINDS_OF_CALL = 25
GROWTH_MIB = 32.0
"""What the C library may keep more or less of freed memory from one sample to the next."""
SECONDS_PER_CALL = 60.0


@dataclass(frozen=True)
class Load:
    """What one model did. Memory is RssAnon in MiB, without what Python and the C library
    merely keep."""

    sequential: int
    seconds: float
    warm_mib: float
    end_mib: float
    warm_files: int
    end_files: int
    threads: int
    unfinished_threads: int
    threaded_calls: int
    different: int
    forked_equal: bool
    freed: bool
    loaded_mib: float
    left_mib: float

    @property
    def faults(self) -> list[str]:
        """What may not be, in a sentence each."""
        found = {
            f"{self.different} results differ from the first ones": self.different > 0,
            f"{self.unfinished_threads} threads did not end": self.unfinished_threads > 0,
            "a forked child computed something else, or hung": not self.forked_equal,
            f"memory grew from {self.warm_mib:.0f} to {self.end_mib:.0f} MiB": (
                self.end_mib > self.warm_mib + GROWTH_MIB
            ),
            f"open files grew from {self.warm_files} to {self.end_files}": (
                self.end_files > self.warm_files
            ),
            "the model was held after `del`": not self.freed,
            f"{self.left_mib:.0f} MiB of the model's {self.loaded_mib:.0f} stayed after `del`": (
                self.left_mib > GROWTH_MIB
            ),
        }
        return [sentence for sentence, is_so in found.items() if is_so]


def measure(folder: Path, *, generates: int, threads: int) -> Load:
    """Load the model, serve with it, delete it; shortly once before, for what is made once."""
    _serve(panguq.load(folder), 4 * threads, threads)
    before = _anonymous_mib()
    model = panguq.load(folder)
    served = _serve(model, generates, threads)
    held, still_there = _anonymous_mib(), weakref.ref(model)
    del model
    left = _anonymous_mib() - before
    return Load(**served, freed=still_there() is None, loaded_mib=held - before, left_mib=left)


def _serve(model: Any, generates: int, threads: int) -> dict[str, Any]:
    def call(index: int) -> Tensor:
        ids, new_tokens = _prompt(index % KINDS_OF_CALL, model.config.vocab_size)
        found: Tensor = model.generate(
            ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        return found

    started = time.monotonic()
    wanted: dict[int, Tensor] = {}
    different, warm_mib, warm_files = 0, 0.0, 0
    for index in range(generates):
        result = call(index)
        kept = wanted.setdefault(index % KINDS_OF_CALL, result)
        different += not torch.equal(result, kept)
        if index == max(generates // 10, 1) - 1:
            warm_mib, warm_files = _anonymous_mib(), _open_files()
    seconds = time.monotonic() - started
    end_mib, end_files = _anonymous_mib(), _open_files()

    calls = list(range(min(generates, 4 * threads)))
    answers: dict[int, Tensor] = {}
    unfinished = _in_threads(call, calls, threads, answers)
    different += sum(
        index not in answers or not torch.equal(answers[index], wanted[index % KINDS_OF_CALL])
        for index in calls
    )
    return {
        "sequential": generates, "seconds": seconds,
        "warm_mib": warm_mib, "end_mib": end_mib,
        "warm_files": warm_files, "end_files": end_files,
        "threads": threads, "unfinished_threads": unfinished, "threaded_calls": len(calls),
        "different": different,
        "forked_equal": _in_child(lambda: torch.equal(call(0), wanted[0])),
    }  # fmt: skip


def _in_threads(
    call: Callable[[int], Tensor], calls: list[int], threads: int, answers: dict[int, Tensor]
) -> int:
    """Share out the calls; how many threads did not end in time."""

    def work(first: int) -> None:
        for index in calls[first::threads]:
            answers[index] = call(index)

    running = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
    for thread in running:
        thread.start()
    deadline = time.monotonic() + SECONDS_PER_CALL * len(calls)
    for thread in running:
        thread.join(max(0.0, deadline - time.monotonic()))
    return sum(thread.is_alive() for thread in running)


def _prompt(index: int, vocabulary: int) -> tuple[Tensor, int]:
    """Token ids `[batch, seq]` of 1 to 3 rows and up to 39 tokens, and how many are to follow."""
    random = Random(index)
    batch, seq = random.choice([1, 1, 1, 2, 3]), random.randrange(1, 40)
    ids = [[random.randrange(3, vocabulary) for _ in range(seq)] for _ in range(batch)]
    return torch.tensor(ids), random.randrange(1, 6)


def _in_child(is_right: Callable[[], bool]) -> bool:
    """What a forked child says within a call's time."""
    child = os.fork()
    if child == 0:
        right = False
        try:
            torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
            right = is_right()
        finally:
            os._exit(0 if right else 1)
    deadline = time.monotonic() + SECONDS_PER_CALL
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def _anonymous_mib() -> float:
    release_free_memory()
    return status_mib("RssAnon")


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _compiled(place: Path) -> Path:
    from demo.fetch import default_cache, fetch_model

    folder = place / "model"
    ids = torch.randint(3, 40_000, (2, 128), generator=torch.Generator().manual_seed(0))
    compiled: Any = panguq.compile(
        panguq.load_pretrained(fetch_model(default_cache())), "w8a8-dynamic", calibration=[ids]
    )
    compiled.save(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, help="what CompiledModel.save wrote")
    parser.add_argument("--generates", type=int, default=500, help="calls in sequence")
    parser.add_argument("--threads", type=int, default=8, help="threads that call at once")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or _compiled(Path(place))
        load = measure(folder, generates=options.generates, threads=options.threads)
    for name, value in asdict(load).items():
        shown = f"{value:.1f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):20} {shown}")
    if options.json:
        options.json.write_text(json.dumps(asdict(load), indent=2) + "\n", encoding="utf-8")
    for fault in load.faults:
        print(f"FAULT: {fault}")
    return 1 if load.faults else 0


if __name__ == "__main__":
    sys.exit(main())
