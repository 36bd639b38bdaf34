"""How a command ends that did not work: one line, and for a fault of panguq's a file to send.

An error that panguq raises on purpose, a full disk, too little memory and Ctrl-C are said in one or
two lines. Any other exception is a fault of panguq's: its traceback goes into a file, with versions
and the command, in the current folder or where temporary files go, if either can be written.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from panguq.errors import PanguqError

WHERE = "the project's issue tracker (form: something is wrong)"
_PACKAGES = ("panguq", "torch", "transformers", "tokenizers", "safetensors", "numpy")
_NO_MEMORY = (
    "can't allocate memory", "Cannot allocate memory", "not enough memory", "failed to map segment",
)  # fmt: skip


def said(error: BaseException, command: list[str], interrupted: bool = False) -> str:
    """What stderr says of an exception that ends a command, `interrupted` if after Ctrl-C."""
    kept = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    if interrupted or isinstance(error, KeyboardInterrupt):
        return f"interrupted{':' if kept else ''}{kept}".replace("\n", " ")
    if isinstance(error, PanguqError):
        return f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else "") + kept
    if isinstance(error, MemoryError) or any(part in str(error) for part in _NO_MEMORY):
        return f"error: there is not enough memory: {_line(error)}{kept}"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename is not None else ""
        return f"error: {name}{error.strerror or error}{kept}"
    file = write_report(error, command)
    send = f"; send {file}, which says more, to" if file else ": set PANGUQ_TRACEBACK=1, and tell"
    return f"error: a fault of panguq: {type(error).__name__}: {_line(error)}{send} {WHERE}{kept}"


def write_report(error: BaseException, command: list[str]) -> Path | None:
    """A new file with all that helps to find the fault; None where none can be written."""
    with suppress(Exception):  # whatever is broken may break this, too
        return _write_report(error, command)
    return None


def _write_report(error: BaseException, command: list[str]) -> Path | None:
    import platform
    import shlex
    import tempfile
    import time
    import traceback

    name = f"panguq-crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    text = "\n".join(
        (
            "panguq ended with a fault of its own. This file names paths of your machine: look "
            "through it before you send it.",
            "",
            f"command: {shlex.join(command)}",
            *(f"{package}: {_version(package)}" for package in _PACKAGES),
            f"python: {platform.python_version()} on {platform.platform()}",
            "",
            "".join(traceback.format_exception(error)),
        )
    )
    for folder in (os.curdir, None):
        with suppress(OSError, ValueError):
            path = Path(folder or tempfile.gettempdir()).absolute() / name
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return path
    return None


def say(text: str) -> None:
    """Print on stderr, if anything can be."""
    with suppress(OSError, ValueError, AttributeError):
        print(text.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def silence_stdout() -> None:
    """Let what is still to be written go nowhere: the interpreter flushes stdout as it ends, and a
    full disk or a reader that has left would have the last word."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
