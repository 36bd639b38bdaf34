"""Modules with odd names, sizes and ops: they compile, load with the same bits, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import panguq
from panguq.ir.analysis.channel_rules import RULES
from panguq.ir.ops.opset import allowed_ops, resolve


class Odd(nn.Module):
    """Runs `forward(self, x)`, given as a function, with a linear and what else it needs."""

    def __init__(self, run: Callable[[Odd, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32)
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def part(self, name: str) -> nn.Module:
        return self.get_submodule(name)


def columns(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def sorted_and_picked(m: Odd, x: Tensor) -> Tensor:
    y = m.linear(x)
    y = y.gather(-1, y.argsort(-1))
    y[:, 0] = 0
    _, where = y.topk(4, -1)
    return y * functional.one_hot(where, 32).sum(-2).flip(0).to(y.dtype)


def turned(m: Odd, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(m.linear(x).unflatten(-1, (-1, 2)))
    y = torch.view_as_real(pairs * torch.polar(torch.ones_like(pairs.real), pairs.real))
    return torch.fft.irfft(torch.fft.rfft(y.flatten(-2), dim=-1), n=32, dim=-1)


MODULES = {
    "names": Odd(
        lambda m, x: m.part("größe 1")(m.part("graph")(m.part("{x}")(x))),
        **{"größe 1": nn.Linear(32, 32), "graph": nn.Linear(32, 32), "{x}": nn.Linear(32, 32)},
    ),
    "convolution": Odd(
        lambda m, x: m.linear(columns(m.part("parts")(columns(x)))),
        parts=nn.Sequential(nn.Conv1d(32, 32, 5), nn.BatchNorm1d(32), nn.GroupNorm(4, 32)),
    ),
    "recurrence": Odd(lambda m, x: m.part("gru")(m.linear(x))[0], gru=nn.GRU(32, 32)),
    "sort": Odd(sorted_and_picked),
    "fft": Odd(turned),
    "halves": Odd(lambda m, x: torch.cat([m.part("one")(y) for y in x.chunk(2, -1)], -1),
                  one=nn.Linear(16, 16)),
    "thirds": Odd(lambda m, x: m.linear(x).unflatten(1, (3, x.shape[1] // 3)).sum(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_it_compiles_and_loads(name: str, tmp_path: Path) -> None:
    model, x = MODULES[name].eval(), torch.randn(3, 9, 32)
    with torch.no_grad():
        wanted = model(x)
    compiled = panguq.compile(model, "float", example_inputs=(x,))
    assert torch.allclose(compiled(x), wanted, atol=1e-5)
    compiled = panguq.compile(model, "w8a16", example_inputs=(x,))
    compiled.save(tmp_path / "saved")
    assert torch.equal(panguq.load(tmp_path / "saved")(x), compiled(x))


def test_a_size_that_must_fit_a_weight_is_refused_at_the_call() -> None:
    given = (torch.ones(3, 9, 32),)
    compiled = panguq.compile(MODULES["halves"].eval(), "float", example_inputs=given)
    assert compiled(torch.ones(1, 2, 32)).shape == (1, 2, 32)
    with pytest.raises(panguq.InputError, match="dimension 2 of input x is 33"):
        compiled(torch.ones(3, 9, 33))


def test_an_input_of_any_name(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, größe: Tensor, _x: Tensor) -> Tensor:
            return größe - _x

    compiled = panguq.compile(Named(), "float", example_inputs=(torch.ones(3, 4), torch.ones(3, 4)))
    compiled.save(tmp_path / "saved")
    assert panguq.load(tmp_path / "saved")(torch.ones(2, 4), torch.zeros(2, 4)).sum() == 8


def test_a_scale_passes_no_op_that_has_no_rule() -> None:
    """What no rule speaks of stops it; these do not commute with a scale for each channel."""
    for name in [
        "sort.default",
        "topk.default",
        "gather.default",
        "conv1d.default",
        "flip.default",
        "batch_norm.default",
        "group_norm.default",
        "gru.input",
        "fft_rfft.default",
        "index_put.default",
        "cumprod.default",
        "lerp.Tensor",
    ]:
        assert resolve(f"aten.{name}") is not None and resolve(f"aten.{name}") not in RULES


def test_no_op_writes_draws_or_reads_memory_that_it_was_not_given() -> None:
    refused = ("as_strided", "empty", "from_file", "set_", "rand", "bernoulli", "resize_", "load")
    for name in allowed_ops():
        op = resolve(name)
        if isinstance(op, torch._ops.OpOverload) and op.namespace == "aten":
            assert not op._schema.is_mutable and "Storage" not in str(op._schema), name
            assert not name.removeprefix("aten.").startswith(refused)


def test_examples_and_buffers_follow_the_model_to_another_dtype() -> None:
    """An Ascend target casts to bfloat16 without being asked, and so it takes float32 examples."""
    model = Odd(lambda m, x: m.linear(x * m.get_buffer("scale"))).eval()
    model.register_buffer("scale", torch.rand(32) + 1)
    x = torch.randn(3, 5, 32)
    compiled = panguq.compile(model, "w8a8", example_inputs=(x,), target="ascend910b1")
    assert compiled(x.bfloat16()).dtype == torch.bfloat16 and model.scale.dtype == torch.float32
    with pytest.raises(
        panguq.InputError, match=r"input x is torch\.float32, the graph takes torch\.bf"
    ):
        compiled(x)
