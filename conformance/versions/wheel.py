"""The built wheel, installed as a user would: a clean environment, no extras, another folder."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from conformance.versions.environments import make_environment, pip_install, run, say
from conformance.versions.requirements import ROOT, constraints_without, lower_bounds


def try_wheel(torch: str) -> None:
    """Build the wheel, install it with its dependencies as pinned, and use it.

    Raises Failed with what went wrong.
    """
    say("building the wheel and installing it outside this folder")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wheel = build_wheel(folder)
        pins = constraints_without(["torch"])
        python = make_environment(ROOT / ".venv-wheel", torch, list(lower_bounds()), pins)
        pip = (str(python), "-m", "pip")
        run(*pip, "uninstall", "-qq", "--yes", "panguq")
        pip_install(python, "-c", str(python.parents[1] / "constraints.txt"), str(wheel))
        run(*pip, "check")
        script = shutil.copy(Path(__file__).with_name("installed.py"), folder)
        for command in ([str(python), script], [str(python.with_name("panguq")), "--help"]):
            print(run(*command, folder=folder))


def build_wheel(folder: Path) -> Path:
    """panguq's wheel, built from a copy of what git lists, so that no old build folder gets in."""
    source = folder / "source"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    options = ("-qq", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    run(sys.executable, "-m", "pip", "wheel", *options, str(source))
    return next(folder.glob("*.whl"))
