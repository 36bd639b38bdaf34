"""The contract tests with the newest release of everything, and which release breaks them."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from conformance.versions.environments import (
    Failed,
    install_panguq,
    installed,
    make_environment,
    newer,
    pip_install,
    say,
)
from conformance.versions.requirements import (
    ROOT,
    TEST_EXTRAS,
    constraints,
    lower_bounds,
    requirements,
)


def try_newest(torch: str, arguments: Sequence[str]) -> int:
    """Run the contract tests with the newest of everything but torch; 0 if all pass.

    Upper bounds do not count. Prints each release that differs from constraints.txt, and for a test
    that fails, with which of these put back it passes.
    """
    wanted = requirements(*TEST_EXTRAS)
    folder = ROOT / ".venv-newest"
    # "Newest" is another set every day: an environment of yesterday says nothing.
    (folder / ".made-of").unlink(missing_ok=True)
    python = make_environment(folder, torch, list(lower_bounds(*TEST_EXTRAS)))
    install_panguq(python, "-e", ".")
    pins, found = constraints(), installed(python)
    beyond = {
        canonicalize_name(o.name) for o in wanted if not o.allows(found[canonicalize_name(o.name)])
    }
    changed = [name for name in newer(found, pins) if name in pins]
    for name in changed:
        bound = ", beyond its bound" if name in beyond else ""
        print(f"{name}: {pins[name]} is pinned, {found[name]} is the newest{bound}", flush=True)
    if not changed:
        print("constraints.txt has the newest releases already", flush=True)
    failed = failing_tests(python, ["tests/contract", *arguments])
    # Direct dependencies first, those beyond their bounds before all others.
    direct = {canonicalize_name(one.name) for one in wanted}
    suspects = sorted(changed, key=lambda name: (name not in beyond, name not in direct))
    blame(python, failed, suspects, found, pins)
    return 1 if failed else 0


def blame(
    python: Path,
    failed: Sequence[str],
    suspects: Sequence[str],
    found: dict[str, str],
    pins: dict[str, str],
) -> None:
    """Put one release back at a time, run what failed, and print what passes then."""
    left = list(failed)
    for name in suspects if failed else ():
        say(f"trying the tests that failed with {name} {pins[name]}")
        pip_install(python, "--no-deps", f"{name}=={pins[name]}")
        still = failing_tests(python, left)
        pip_install(python, "--no-deps", f"{name}=={found[name]}")
        for test in left:
            if test not in still:
                print(f"{name} {found[name]} breaks {test}: with {pins[name]} it passes")
        left = still
        if not left:
            return
    for test in left:
        print(f"{test} fails, whichever single release is put back")


def failing_tests(python: Path, tests: Sequence[str]) -> list[str]:
    """Run tests, given by file or name, and return the names of those that fail.

    Raises Failed where pytest itself cannot go on.
    """
    with tempfile.TemporaryDirectory() as cache:
        command = (str(python), "-m", "pytest", "-q", "-o", f"cache_dir={cache}", *tests)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code not in (0, 1):
            raise Failed(f"pytest ended with {code}")
        record = Path(cache) / "v" / "cache" / "lastfailed"
        return list(json.loads(record.read_text(encoding="utf-8"))) if code == 1 else []
