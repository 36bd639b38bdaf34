"""Programs that a model wrote are hostile: each runs in namespaces of its own, or not at all.

Inside there is no network, no folder of the user's, Python read-only, a small tmpfs to write to,
and limits on memory, processes, files, time and output. The user is nobody, without capabilities or
a way to new ones. `bwrap` (bubblewrap) makes it where it is installed, else `unshare` of
util-linux with sandbox_inside.py. Where the kernel denies namespaces, running is refused.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from panguq.errors import InputError

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
TOOLS = ("bwrap", "unshare")


@dataclass(frozen=True)
class ProgramLimits:
    """For one program: bytes of `memory` a process, how many `processes`, bytes of a `file` and of
    all files, `seconds` of CPU time and of the clock, bytes of `output`."""

    memory: int = 2**30
    processes: int = 16
    file: int = 2**26
    seconds: int = 10
    output: int = 2**16


@dataclass(frozen=True)
class ProgramResult:
    """Whether a program ran to its end, and what it said last, or what ended it."""

    passed: bool
    reason: str = ""


def run_program(
    source: str,
    limits: ProgramLimits | None = None,
    *,
    unsafe: bool = False,
    tool: str | None = None,
) -> ProgramResult:
    """Run a program in the sandbox; it passed if its last line was reached.

    unsafe: run it in an ordinary process, with the limits and nothing else; the user's own word.
    tool: `bwrap` or `unshare`; by default what is there. Raises InputError where neither works.
    """
    limits = limits or ProgramLimits()
    if not unsafe:
        tool = tool or sandbox_tool()
    secret = secrets.token_hex(16)  # a program that ends itself early does not say it
    program = f"{source}\n\nprint({secret!r})\n"
    with tempfile.TemporaryDirectory(prefix="panguq-sandbox-") as root:
        os.chmod(root, 0o755)
        command = _command(None if unsafe else tool, limits, root)
        said, ended = _run(command, program, limits)
    if not ended and said.rstrip().endswith(secret):
        return ProgramResult(True)
    return ProgramResult(False, ended or _last_line(said) or "it ended before its last line")


@functools.cache
def sandbox_tool() -> str:
    """The first tool that makes a sandbox here. Raises InputError where none does."""
    said = {}
    for tool in TOOLS:
        if shutil.which(tool) is None:
            said[tool] = "not installed"
            continue
        verdict = run_program("pass", tool=tool)
        if verdict.passed:
            return tool
        said[tool] = verdict.reason
    reasons = "; ".join(f"{tool}: {reason}" for tool, reason in said.items())
    raise InputError(
        f"code that a model wrote runs in a sandbox only, and there is none here ({reasons})",
        "install bubblewrap and allow user namespaces, or take --unsafe-no-sandbox on a machine "
        "that has nothing to lose",
    )


def _command(tool: str | None, limits: ProgramLimits, root: str) -> Sequence[str]:
    inside = resources.files("panguq.tasks").joinpath("sandbox_inside.py").read_text("utf-8")
    python = getattr(sys, "_base_executable", sys.executable) or sys.executable
    # Of root's processes the kernel counts none, so that inside root becomes nobody.
    root_starts = os.geteuid() == 0 and tool is not None
    given = {**asdict(limits), "nobody": root_starts, "inside": tool is not None}
    start = [os.path.realpath(python), "-I", "-S", "-c", inside, json.dumps(given)]
    paths = [path for path in SYSTEM if os.path.lexists(path)]
    home = os.path.realpath(sys.base_prefix)
    if not any(Path(home).is_relative_to(path) for path in paths):
        paths.append(home)
    if tool is None:
        return start
    if tool == "unshare":
        names = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        names += [] if root_starts else ["--user", "--map-root-user"]
        return ["unshare", *names, *start, root, *paths]
    binds: list[str] = []
    for path in paths:
        link = os.path.islink(path)
        for parent in reversed(Path(path).parents[:-1]):  # bwrap's own are for their owner alone
            binds += ["--perms", "0755", "--dir", str(parent)]
        binds += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    names = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    if root_starts:
        names += ["--cap-drop", "ALL"]
        for capability in ("SETUID", "SETGID", "SETPCAP"):
            names += ["--cap-add", f"CAP_{capability}"]
    else:
        names += ["--unshare-user"]
    return [
        "bwrap", *names, "--die-with-parent", "--new-session", *binds, "--proc", "/proc",
        "--dev", "/dev", "--size", str(limits.file), "--perms", "1777", "--tmpfs", "/tmp",
        "--remount-ro", "/dev", "--chdir", "/tmp", *start,
    ]  # fmt: skip


def _run(command: Sequence[str], program: str, limits: ProgramLimits) -> tuple[str, str]:
    """What a command said, and what ended it if that was not itself."""
    with tempfile.TemporaryFile() as source:
        source.write(program.encode(errors="replace"))
        source.seek(0)
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
        try:
            return _watched(process, limits)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _watched(process: subprocess.Popen[bytes], limits: ProgramLimits) -> tuple[str, str]:
    assert process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    said = b""
    with process.stdout as stream, selectors.DefaultSelector() as waiting:
        waiting.register(stream, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.select(left):
                return said.decode(errors="replace"), f"it took more than {limits.seconds} s"
            piece = os.read(stream.fileno(), 1 << 16)
            said += piece
            if len(said) > limits.output:
                return "", f"it said more than {limits.output} bytes"
            if not piece:
                break
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(deadline - time.monotonic(), 1))
    code = process.poll()
    if code is None:
        return said.decode(errors="replace"), f"it took more than {limits.seconds} s"
    if code < 0:
        return said.decode(errors="replace"), f"it was ended by signal {-code}"
    return said.decode(errors="replace"), "" if code == 0 else _last_line(
        said.decode(errors="replace")
    ) or f"it ended with status {code}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
