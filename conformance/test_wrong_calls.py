"""Calls that are wrong on purpose: what the real stack refuses, panguq's contracts refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conformance.calls import Answer, ask_contract, ask_host, ask_meta
from conformance.ge_graph import ask_torchair
from conformance.moe_wrong_calls import MOE_WRONG_CALLS
from conformance.wrong_calls import WRONG_CALLS, WrongCall

LAYERS = ("meta", "torchair", "host")
CALLS = (*WRONG_CALLS, *MOE_WRONG_CALLS)


def verdicts(wrong: WrongCall) -> dict[str, Answer]:
    """What each real layer says. torchair is asked what the Meta kernel let pass."""
    meta = ask_meta(wrong.call)
    converter = Answer(None) if meta.refusal else ask_torchair(wrong.call)[0]
    if "no converter" in (converter.refusal or ""):
        converter = Answer(None)  # which says nothing about this call
    return {"meta": meta, "torchair": converter, "host": ask_host(wrong.call)[0]}


Row = tuple[WrongCall, dict[str, Answer], Answer]


@pytest.fixture(scope="module")
def table() -> list[Row]:
    """All wrong calls with all verdicts."""
    return [(wrong, verdicts(wrong), ask_contract(wrong.call)) for wrong in CALLS]


def test_who_refuses_what_is_the_golden_table(
    table: list[Row], golden: Callable[[str, str], None]
) -> None:
    """One line a call: the op, what is wrong, which real layers and which page refuse it."""
    lines = []
    for wrong, said, contract in table:
        refusing = [layer for layer in LAYERS if said[layer].refusal]
        refusing += [wrong.documented] if wrong.documented else []
        refusing += ["panguq"] if contract.refusal else []
        op = wrong.call.op.removeprefix("npu_")
        lines.append(f"{op:28} {wrong.why:52} {', '.join(refusing)}\n")
    golden("wrong_calls", "".join(lines))


def test_contract_refuses_what_any_layer_or_page_refuses(
    table: list[Row],
) -> None:
    """Every call of the table is refused by a real layer or a page, and so by panguq."""
    for wrong, said, contract in table:
        by_layer = [layer for layer in LAYERS if said[layer].refusal]
        assert by_layer or wrong.documented, f"nobody refuses: {wrong.why}: {wrong.call}"
        assert contract.refusal, f"panguq takes: {wrong.why}: {wrong.call}"


def test_each_layer_refuses_something(
    table: list[Row],
) -> None:
    """A layer that takes everything is not connected."""
    for layer in LAYERS:
        assert any(said[layer].refusal for _, said, _ in table), layer
    said_by = [{layer for layer in LAYERS if said[layer].refusal} for _, said, _ in table]
    assert set() in said_by  # what only the documents rule out
    assert {"torchair"} in said_by  # what the Meta kernel lets pass
    assert {"host"} in said_by


def test_why_is_said_once_for_each_op(
    table: list[Row],
) -> None:
    """No call stands twice."""
    calls = [str(wrong.call) for wrong, _, _ in table]
    assert len(set(calls)) == len(calls)
