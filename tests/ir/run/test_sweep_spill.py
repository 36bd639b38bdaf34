"""Activations in files are the same activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

from panguq.ir.run.interpret import Values
from panguq.ir.run.reverse_sweep import reverse_sweep
from panguq.ir.run.sweep import sweep
from panguq.passes.pipeline.base import linears, no_progress
from panguq.tensors import spill
from panguq.tensors.memory import return_large_blocks
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import canonical, family_context
from tests.peak_memory import peak_mib

Seen = dict[tuple[str, int], torch.Tensor]


def inputs(family: str) -> Seen:
    """What enters each linear, by the node's name and the order of being shown."""
    gm, _ = canonical(family)
    seen: Seen = {}

    def observe(node: fx.Node, value: torch.Tensor) -> None:
        seen[node.name, len(seen)] = value.clone()

    watch = {node.args[0] for node in linears(gm)}
    sweep(gm, family_context(family).batches, watch, observe, no_progress)
    return seen


def gradients(family: str) -> Seen:
    """The gradient of the sum of all logits at each linear's output."""
    gm, _ = canonical(family)
    found: Seen = {}

    def observe(seen: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for node, (_, gradient, *_) in seen.items():
            found[node.name, len(found)] = gradient.clone()

    batches = family_context(family).batches
    watch, done = linears(gm), lambda: None
    reverse_sweep(gm, batches, watch, torch.ones_like, observe, done, no_progress)
    return found


@pytest.mark.parametrize("measure", [inputs, gradients])
def test_spilled_activations_give_the_same_bits(
    measure: Callable[[str], Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = measure("llama")
    stored = []
    put = WeightStore.put

    def counted(self: WeightStore, tensor: torch.Tensor) -> torch.Tensor:
        stored.append(tensor.nbytes)
        return put(WeightStore(in_memory_bytes=1), tensor)

    monkeypatch.setattr(WeightStore, "put", counted)
    assert measure("llama").keys() == plain.keys() and not stored  # far below the limit
    monkeypatch.setattr(spill, "SPILL_BYTES", 0)
    spilled = measure("llama")
    assert stored
    assert spilled.keys() == plain.keys()
    assert all(torch.equal(spilled[key], plain[key]) for key in plain)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_spilled_values_leave_no_memory_behind() -> None:
    """As a sweep does it: blocks that live shortly, and one of each that is kept in a file."""

    def spill_all() -> int:
        return_large_blocks()
        node, kept = fx.Graph().placeholder("x"), []
        for _ in range(100):
            block = [torch.ones(1 << 18) for _ in range(4)]
            environment: Values = {node: block[2]}
            del block
            spill.to_files([environment])
            kept.append(environment)
        return 0

    assert peak_mib(spill_all) < 50  # of 100 that are spilled
