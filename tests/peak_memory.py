"""How much memory something takes, without what files stand behind."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

from panguq.tensors.memory import release_free_memory


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
