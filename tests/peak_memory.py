"""How much memory something takes, without what files stand behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from panguq.tensors.memory import release_free_memory

ROOT = Path(__file__).parents[1]


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def peak_mib(run: Callable[[], int]) -> float:
    """How much anonymous memory `run` adds at its peak, in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            release_free_memory()  # else a run may live on what its parent has freed
            start = peak = anonymous_mib()
            done = threading.Event()

            def sample() -> None:
                nonlocal peak
                while not done.wait(0.005):
                    peak = max(peak, anonymous_mib())

            thread = threading.Thread(target=sample)
            thread.start()
            code = run()
            done.set()
            thread.join()
            os.write(writer, f"{code} {peak - start}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        code, peak = pipe.read().split()
    os.waitpid(child, 0)
    assert code == "0"
    return float(peak)


def peaks_of_commands(commands: Sequence[Sequence[str]], *, after: Sequence[str]) -> list[float]:
    """How much anonymous memory each `panguq COMMAND` adds at its peak, after `panguq AFTER`.

    All run in a process that is new, so that no test before counts: a worker of a long run held
    twice as much. The first brings what is imported and made once.
    """
    code = "import json, sys; from tests.peak_memory import run; run(*json.loads(sys.argv[1]))"
    given = json.dumps([list(after), [list(command) for command in commands]])
    done = subprocess.run(
        [sys.executable, "-c", code, given], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    peaks: list[float] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def run(first: list[str], others: list[list[str]]) -> None:
    """Run the first command here, then each other one in a child; print the children's peaks."""
    import torch

    from panguq.cli import main

    torch.set_num_threads(1)
    assert main(first) == 0
    print(json.dumps([peak_mib(lambda other=other: main(other)) for other in others]))
