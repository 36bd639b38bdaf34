"""Try panguq with other releases: python -m conformance.versions WHAT [pytest's arguments].

oldest       the contract tests with every dependency but torch at its lower bound
newest       the same with the newest of everything but torch; says which release breaks what
torch        the same with the release of torch that --torch names, and all else as pinned
wheel        the built wheel in an environment of its own, outside this folder, without extras
constraints  write constraints.txt anew: the newest releases within the bounds
pythons      whether the pinned releases exist for Pythons that the tests have not run on
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from conformance.versions.environments import (
    TORCH,
    Failed,
    install_panguq,
    make_environment,
    run_contract_tests,
    say,
)
from conformance.versions.newest import try_newest
from conformance.versions.requirements import (
    CONSTRAINTS_OLDEST,
    ROOT,
    TEST_EXTRAS,
    constraints_without,
    lower_bounds,
)
from conformance.versions.resolve import check_python, write_constraints
from conformance.versions.wheel import try_wheel

OTHER_PYTHONS = ("3.12", "3.13")


def main() -> int:
    """Do what is asked; 0 if nothing broke."""
    parser = argparse.ArgumentParser(prog="python -m conformance.versions", description=__doc__)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--torch", default=TORCH, help="as pip is to be asked for it")
    options, arguments = parser.parse_known_args()
    try:
        return COMMANDS[options.what](options.torch, arguments)
    except Failed as error:
        say(f"failed: {error}")
        return 1


def try_oldest(torch: str, arguments: Sequence[str]) -> int:
    """The contract tests with the lower bounds; what those need in turn is as pinned."""
    wanted = [f"{name}=={release}" for name, release in lower_bounds(*TEST_EXTRAS).items()]
    pins = CONSTRAINTS_OLDEST.read_text(encoding="utf-8")
    python = make_environment(ROOT / ".venv-oldest", torch, wanted, pins)
    install_panguq(python, "-e", ".")
    return run_contract_tests(python, arguments)


def try_torch(torch: str, arguments: Sequence[str]) -> int:
    """The contract tests with another torch, within the bounds or not."""
    pins = constraints_without(["torch"])
    python = make_environment(ROOT / ".venv-torch", torch, list(lower_bounds(*TEST_EXTRAS)), pins)
    install_panguq(python, "-e", ".")
    return run_contract_tests(python, arguments)


def _wheel(torch: str, arguments: Sequence[str]) -> int:
    try_wheel(torch)
    return 0


def _constraints(torch: str, arguments: Sequence[str]) -> int:
    write_constraints(torch)
    return 0


def _pythons(torch: str, arguments: Sequence[str]) -> int:
    for version in OTHER_PYTHONS:
        check_python(version)
    return 0


COMMANDS: dict[str, Callable[[str, Sequence[str]], int]] = {
    "oldest": try_oldest,
    "newest": try_newest,
    "torch": try_torch,
    "wheel": _wheel,
    "constraints": _constraints,
    "pythons": _pythons,
}


if __name__ == "__main__":
    sys.exit(main())
