"""Virtual environments with chosen releases, each made once and again when the choice changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from conformance.versions.requirements import ROOT, constraints

TORCH = f"torch=={constraints()['torch']}"


class Failed(Exception):
    """A command that did not end well; the message says which, and what it printed."""


def make_environment(folder: Path, torch: str, packages: Sequence[str], pins: str = "") -> Path:
    """The interpreter of an environment with torch and these packages, but without panguq.

    torch: how pip is to be asked for it, options included; it is installed first and stays.
    pins: a constraints file's text. Raises Failed with what pip said.
    """
    folder = folder.absolute()
    python, stamp = folder / "bin" / "python", folder / ".made-of"
    made_of = hashlib.sha256(repr((torch, packages, pins, sys.version)).encode()).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == made_of:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    say(f"making {folder.name}: {torch}")
    run(sys.executable, "-m", "venv", str(folder))
    pip_install(python, *torch.split())
    say(f"making {folder.name}: {len(packages)} packages and what they need")
    pin_file = folder / "constraints.txt"
    pin_file.write_text(f"torch=={installed(python)['torch']}\n{pins}", encoding="utf-8")
    pip_install(python, "-c", str(pin_file), *packages)
    stamp.write_text(made_of, encoding="utf-8")
    return python


def install_panguq(python: Path, *what: str) -> None:
    """Put panguq in, without what it depends on: no bound of its own has a say."""
    pip_install(python, "--no-deps", "--force-reinstall", *what)


def pip_install(python: Path, *arguments: str) -> None:
    """`pip install` in another environment; its warnings are left out, its errors are not."""
    run(str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments)


def installed(python: Path) -> dict[str, str]:
    """What an environment has: releases by normalized name, without what follows a `+`."""
    listed = json.loads(run(str(python), "-m", "pip", "list", "--format", "json"))
    return {canonicalize_name(one["name"]): one["version"].partition("+")[0] for one in listed}


def newer(releases: dict[str, str], than: dict[str, str]) -> list[str]:
    """Names whose release is newer than, or missing in, the other table."""
    return sorted(
        name
        for name, release in releases.items()
        if name not in than or Version(release) > Version(than[name])
    )


def run_contract_tests(python: Path, arguments: Sequence[str] = ()) -> int:
    """pytest's exit code for tests/contract of this source tree under another interpreter."""
    command = (str(python), "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/contract")
    return subprocess.run((*command, *arguments), cwd=ROOT, check=False).returncode


def run(*command: str, folder: Path = ROOT) -> str:
    """What a command prints on stdout. Raises Failed with all that it printed."""
    variables = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}\n{(done.stdout + done.stderr).strip()[-3000:]}")
    return done.stdout


def say(what: str) -> None:
    """A line on stderr, at once."""
    print(what, file=sys.stderr, flush=True)
