"""A few cases of every attack find nothing; what they are to find, they do."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

from fuzz.__main__ import main
from fuzz.kind import Case, Fault, Kind, judge
from fuzz.kinds import KINDS
from fuzz.run import attack
from panguq.errors import RecipeError, VerifyError

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "recipes": 150,
    "compiles": 6,
    "modules": 8,
    "graphs": 60,
    "files": 15,
    "flips": 12,
    "kills": 1,
    "environments": 3,
}
SEED = 20


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_few_cases_find_nothing(kind: Kind, tmp_path: Path) -> None:
    case = kind.prepare(tmp_path)
    came = [judge(kind, case, SEED, number) for number in range(CASES[kind.name])]
    # an attack that is always refused attacks nothing; what a signal meets, chance says
    assert len(set(came)) > 1 or kind.name == "kills"


def _kind(case: Case, seconds: float = 60.0) -> Kind:
    return Kind("one", "a case that a test gives", lambda folder: case, seconds)


def _refused(rng: random.Random) -> str:
    raise RecipeError("no", "write another")


def _blames(rng: random.Random) -> str:
    raise VerifyError("after pass 03 the graph is wrong")


def _raw(rng: random.Random) -> str:
    raise KeyError("x")


def _unprintable(rng: random.Random) -> str:
    raise RecipeError("\ud800")


def _hangs(rng: random.Random) -> str:
    time.sleep(60)
    return "compiled"


def test_a_refusal_is_no_fault() -> None:
    assert judge(_kind(_refused), _refused, 7, 0) == "refused"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (_blames, "blames panguq: after pass 03"),
        (_raw, "KeyError: 'x', test_fuzz.py:"),
        (_unprintable, "cannot be printed"),
    ],
)
def test_all_else_is(case: Case, said: str) -> None:
    with pytest.raises(Fault, match=said):
        judge(_kind(case), case, 7, 0)


def test_a_case_that_hangs_is_interrupted() -> None:
    with pytest.raises(Fault, match=r"not done after 0\.2 s"):
        judge(_kind(_hangs, 0.2), _hangs, 7, 0)


def test_a_case_is_drawn_by_seed_and_number_alone() -> None:
    def draws(rng: random.Random) -> str:
        return str(rng.random())

    kind = _kind(draws)
    drawn = [judge(kind, draws, seed, number) for seed in (7, 8) for number in (0, 1)]
    assert len(set(drawn)) == 4 and judge(kind, draws, 8, 1) == drawn[3]


def test_a_case_that_kills_its_process_is_named_and_the_next_one_runs() -> None:
    def dies(rng: random.Random) -> str:
        if rng.random() < 0.5:
            os._exit(9)
        return "lived"

    tally = attack(_kind(dies), 7, iter(range(8)), time.monotonic() + 60, go_on=True)
    assert tally.faults and set(tally.faults.values()) == {"ends the process"}
    assert tally.outcomes["lived"] == 8 - len(tally.faults)
    number = min(tally.faults)
    assert (
        next(tally.repeats()) == f"python -m fuzz one --seed 7 --case {number}  # ends the process"
    )


def test_one_case_runs_alone_and_an_unknown_kind_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "recipes", "--seed", "7", "--case", "3"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("recipes, seed 7, case 3: ")
    monkeypatch.setattr(sys, "argv", ["fuzz", "recipe"])
    with pytest.raises(SystemExit):
        main()
    assert "no kind 'recipe'; the kinds are recipes" in capsys.readouterr().err
