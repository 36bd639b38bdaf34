"""Where Python looks for garbage during a compile."""

from __future__ import annotations

import gc
import weakref

import pytest

from panguq.tensors.memory import new_garbage_alone


class Ring:
    """Garbage that only a search for cycles finds."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_made_within_is_found_and_what_was_before_waits() -> None:
    before = Ring()
    old = weakref.ref(before)
    with new_garbage_alone():
        assert gc.get_freeze_count() > 0
        del before
        new = weakref.ref(Ring())
        gc.collect()
        assert new() is None
        assert old() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None


def test_objects_are_thawed_after_an_error() -> None:
    with pytest.raises(KeyError), new_garbage_alone():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_somebody_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        with new_garbage_alone(), new_garbage_alone():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
