"""A few families, one trace each: the float graph is the model, and 8 bits stay near it.

`make test-families` tries all of them, with every stage.
"""

from __future__ import annotations

import pytest
import torch

import panguq
from panguq.errors import TraceError
from tests.families.encoders import ENCODERS
from tests.families.models import FAMILIES, make
from tests.families.sweep import (
    CALIBRATION,
    END,
    PAGE,
    check_float,
    page_table,
    quantized,
)
from tests.shared_traces import shared_traces

SHORT = ("bloom", "cohere2", "gemma3_text", "olmo2")


@pytest.mark.parametrize("family", SHORT)
def test_float_and_8_bits(family) -> None:
    model = make(family)
    with shared_traces():
        compiled = panguq.compile(model, "float")
        check_float(model, compiled)
        quantized(model, panguq.compile(model, "w8a8-dynamic", calibration=CALIBRATION))


def test_a_wrong_graph_is_found() -> None:
    model, other = make("qwen3"), make("qwen3")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(AssertionError, match="a prompt"):
        check_float(model, panguq.compile(other, "float"))


@pytest.mark.parametrize("family", ["mamba"])
def test_what_is_refused_is_said_in_one_sentence_by_the_plan_too(family) -> None:
    model = make(family)
    messages = set()
    for command in (panguq.compile, panguq.plan):
        with pytest.raises(TraceError) as caught:
            command(model, "w8a8-dynamic")
        messages.add(caught.value.message)
    (message,) = messages
    assert "\n" not in message
    assert message in page_table()


def test_the_page_has_a_row_for_every_family() -> None:
    rows = [line.split("|")[1].strip() for line in page_table().splitlines() if "|" in line]
    named = [name for name in rows if name not in ("family", "class", "---")]
    assert sorted(named) == sorted([*FAMILIES, *ENCODERS])
    assert PAGE.read_text(encoding="utf-8").count(END) == 1
