"""Several processes that compile one model: the same bits as one, and no word of one is lost."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import panguq
from panguq.errors import InputError
from panguq.ir.edit import weights_of
from panguq.ir.text.printer import content_hash
from panguq.passes.codes.gram import gram
from panguq.ranks import Ranks, as_ranks, ranks
from panguq.tensors.work_folder import WorkFolder
from tests.model_folders import make_model
from tests.rank_runs import run_ranks

GPTQ = {
    "name": "codes",
    "schemes": {"*": "W4A16"},
    "passes": ["weigh-tokens", "insert-fake-quant", "gptq", {"tune-scales": {"epochs": 1}}],
}
SEARCHES = {
    "name": "scales",
    "schemes": {"*": "W8A8", "*.down_proj": "W4A16"},
    "passes": [
        {"smoothquant": {"alpha": "search"}},
        "awq",
        "calibrate",
        "quantize-kv-cache",
        "insert-fake-quant",
        {"quantize-weights": {"clip_search": True}},
    ],
}
IDS = torch.arange(96).reshape(3, 32) * 7 % 60  # three batches: no two ranks have as many


def compiled_bits(recipe: object, work_dir: Path | None = None) -> str:
    model = make_model(num_hidden_layers=1)
    made = panguq.compile(model, recipe, calibration=IDS, work_dir=work_dir)
    digest = hashlib.sha256(str(made.report.end_to_end).encode())
    for gm in made.artifact.stages.values():
        for name, tensor in sorted(weights_of(gm).items()):
            digest.update(f"{name}{content_hash(tensor)}".encode())
    return digest.hexdigest()


@pytest.fixture(scope="module", params=[GPTQ, SEARCHES], ids=lambda recipe: recipe["name"])
def recipe(request: pytest.FixtureRequest) -> object:
    return request.param


@pytest.fixture(scope="module")
def bits_of_one(recipe: object) -> str:
    return compiled_bits(recipe)


def test_two_ranks_make_the_bits_of_one(recipe, bits_of_one: str, tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path / "two", lambda rank: compiled_bits(recipe)) == [bits_of_one] * 2


def die_after(count: int, function: str) -> None:
    """Let this process die in the count-th call, counted from 1, of a method of Ranks."""
    original, calls = getattr(Ranks, function), 0

    def counted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(Ranks, function, counted)


def test_a_compile_whose_rank_was_killed_goes_on_in_one_process(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        if rank == 1:
            die_after(3, "add_up")
        return compiled_bits(GPTQ, tmp_path / "work")

    first, second = run_ranks(2, tmp_path / "two", work)
    assert second is None
    assert first is not None and first.startswith("RankError: rank 1 has ended")
    units = WorkFolder(tmp_path / "work")
    assert units.holds_units
    units.close()
    assert compiled_bits(GPTQ, tmp_path / "work") == compiled_bits(GPTQ)


# --- what ranks tell each other, without a compile ----------------------------------------------


def told(tmp_path: Path, work: Callable[[Ranks], object], count: int = 3) -> list[str | None]:
    def together(rank: int) -> str:
        with as_ranks() as joint:
            return str(work(joint))

    return run_ranks(count, tmp_path / "ranks", together)


def test_three_ranks_share_work_and_know_all_of_it(tmp_path: Path) -> None:
    batches = [torch.randn(5 + i, 9, generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def work(joint: Ranks) -> object:
        own = joint.share(batches)
        total = torch.full((5,), joint.rank + 1)
        joint.add_up([total])
        return (
            len(own) in (1, 2),
            all(map(torch.equal, joint.in_order(own), batches)),
            joint.each([3, 1, 2, 9], float, lambda item: (item, ranks().count)),
            joint.from_first(lambda: f"{joint.rank} of {ranks().count}"),
            joint.largest(torch.tensor([joint.rank, -joint.rank])).tolist(),
            total.tolist(),
            torch.equal(gram(own), joint.from_first(lambda: gram(batches))),
        )

    found = told(tmp_path, work)
    wanted = (True, True, [(i, 1) for i in (3, 1, 2, 9)], "0 of 1", [2, 0], [6] * 5, True)
    assert found == [str(wanted)] * 3


def test_more_ranks_than_batches_are_refused(tmp_path: Path) -> None:
    said = told(tmp_path, lambda joint: joint.share([1, 2]))
    assert all(one and one.startswith("InputError: 3 ranks share 2 batches") for one in said)


def test_an_error_of_one_is_raised_by_all(tmp_path: Path) -> None:
    def work(joint: Ranks) -> object:
        if joint.rank == 1:
            raise InputError("row 7 is bad", "mend it")
        return joint.exchange(1)

    assert told(tmp_path, work) == ["InputError: row 7 is bad\nHint: mend it"] * 3


def test_a_fault_of_one_ends_all_and_names_it(tmp_path: Path) -> None:
    first, second, third = told(tmp_path, lambda joint: joint.exchange(1 / (joint.rank - 2)))
    assert third == "ZeroDivisionError: division by zero"
    assert first == second
    assert first is not None and first.startswith("RankError: rank 2 has failed: ZeroDivisionError")


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("where", ["exchange", "_pass_up", "_pass_down"])
def test_a_rank_that_dies_is_named_by_all_others(tmp_path: Path, victim: int, where: str) -> None:
    def work(joint: Ranks) -> object:
        if joint.rank == victim:
            die_after(1, where)
        joint.add_up([torch.ones(10)])
        return joint.exchange(1)

    said = told(tmp_path, work)
    assert said.pop(victim) is None
    assert all(one and one.startswith(f"RankError: rank {victim} has ended") for one in said)
