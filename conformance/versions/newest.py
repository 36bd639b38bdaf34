"""The contract tests with the newest release of everything, and which release breaks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from conformance.versions.environments import (
    install_panguq,
    installed,
    make_environment,
    newer,
    pip_install,
    run_contract_tests,
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
    """Run the contract tests with the newest of everything but torch; pytest's exit code.

    Upper bounds do not count. Prints each release that differs from constraints.txt, and where
    tests fail, which of them fail no more once that one release is put back.
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
    code = run_contract_tests(python, arguments)
    if code != 0:
        # Direct dependencies first, those beyond their bounds before all others.
        direct = {canonicalize_name(one.name) for one in wanted}
        suspects = sorted(changed, key=lambda name: (name not in beyond, name not in direct))
        _blame(python, suspects, found, pins)
    return code


def _blame(
    python: Path, suspects: Sequence[str], found: dict[str, str], pins: dict[str, str]
) -> None:
    """Put one release back at a time, and run what failed."""
    for name in suspects:
        say(f"trying the tests that failed with {name} {pins[name]}")
        pip_install(python, "--no-deps", f"{name}=={pins[name]}")
        passed = run_contract_tests(python, ["--last-failed", "--last-failed-no-failures=none"])
        pip_install(python, "--no-deps", f"{name}=={found[name]}")
        if passed == 0:
            print(f"{name} {found[name]} breaks them: with {pins[name]} they pass")
            return
    print("no single release that was put back makes all of them pass")
