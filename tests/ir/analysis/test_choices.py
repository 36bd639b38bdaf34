"""What decides is found by what follows from it, whatever it is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from panguq.ir.analysis.choices import deciding_linears
from panguq.ir.edit import module_path, op_name
from tests.model_shelf import trace_tiny


class Chooser(nn.Module):
    """`up` feeds `score`, whose best entries choose rows of a table; `down` reads them."""

    def __init__(self, reads_indices: bool) -> None:
        super().__init__()
        self.up, self.score, self.down = (nn.Linear(8, 8) for _ in range(3))
        self.table = nn.Buffer(torch.randn(8, 8))
        self.reads_indices = reads_indices

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(self.up(x)).sigmoid().reshape(-1, 8)
        values, indices = (scores + 1).masked_fill(scores < 0.1, 0.0).topk(8)
        return self.down(self.table[indices[:, 0]] if self.reads_indices else values)


def test_the_last_linear_before_a_choice_decides() -> None:
    gm, _ = trace_tiny(Chooser(True), torch.randn(3, 8))
    found = {
        module_path(linear): op_name(choice) for linear, choice in deciding_linears(gm).items()
    }
    assert found == {"score": "topk"}


def test_values_alone_are_no_choice() -> None:
    gm, _ = trace_tiny(Chooser(False), torch.randn(3, 8))
    assert deciding_linears(gm) == {}
