"""A model that serves: the same results from many calls and threads, and nothing held."""

from dataclasses import replace

import pytest
import torch

import panguq
from bench.load import Load, measure
from tests.model_folders import make_model


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("load") / "model"
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    panguq.compile(make_model(), "w8a8-dynamic", calibration=ids).save(folder)
    return measure(folder, generates=40, threads=4)


def test_calls_in_sequence_in_threads_and_in_a_forked_child_give_the_same(load: Load) -> None:
    assert load.threaded_calls == 16
    assert (load.different, load.unfinished_threads, load.forked_equal) == (0, 0, True)


def test_neither_memory_nor_open_files_grow(load: Load) -> None:
    assert load.faults == []


def test_each_fault_is_a_sentence(load: Load) -> None:
    bad = replace(
        load, different=1, unfinished_threads=2, forked_equal=False, freed=False,
        end_mib=load.warm_mib + 50, end_files=load.warm_files + 1, left_mib=90.0,
    )  # fmt: skip
    assert len(bad.faults) == 7
