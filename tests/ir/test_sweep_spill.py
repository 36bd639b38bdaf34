import pytest
import torch
from torch import fx

from panguq.ir import sweep as sweep_module
from panguq.ir.sweep import sweep
from panguq.ir.weight_store import WeightStore
from panguq.passes.base import linears, no_progress
from tests.models import canonical, family_context


def observed(family: str) -> dict[tuple[fx.Node, int], torch.Tensor]:
    gm, _ = canonical(family)
    seen: dict[tuple[str, int], torch.Tensor] = {}
    inputs = {node.args[0] for node in linears(gm)}

    def observe(node: fx.Node, value: torch.Tensor) -> None:
        seen[node.name, len(seen)] = value.clone()

    sweep(gm, family_context(family).batches, inputs, observe, no_progress)
    return seen


def test_spilled_activations_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = observed("llama")
    stored = []
    put = WeightStore.put

    def counted(self: WeightStore, tensor: torch.Tensor) -> torch.Tensor:
        stored.append(tensor.nbytes)
        return put(WeightStore(in_memory_bytes=1), tensor)

    monkeypatch.setattr(WeightStore, "put", counted)
    assert observed("llama").keys() == plain.keys() and not stored  # far below the limit
    monkeypatch.setattr(sweep_module, "SPILL_BYTES", 0)
    spilled = observed("llama")
    assert stored
    assert spilled.keys() == plain.keys()
    assert all(torch.equal(spilled[key], plain[key]) for key in plain)
