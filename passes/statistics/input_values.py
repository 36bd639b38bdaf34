"""What is to be remembered of the values that matmuls read, as those matmuls need it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from panguq.ir.edit import get_tensor
from panguq.ir.input_statistics import InputStatistics
from panguq.ir.node_meta import scheme_of
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.views import ExpertLinear, Linear


def statistics_for(gm: fx.GraphModule, value: fx.Node, readers: list[fx.Node]) -> InputStatistics:
    """Empty statistics of a value `[..., k]` that these matmuls read."""
    k = int(value.meta["val"].shape[-1])
    return InputStatistics(k, _column_energy(gm, readers), _experts(readers))


def _column_energy(gm: fx.GraphModule, nodes: list[fx.Node]) -> Tensor | None:
    """What an error in each input channel costs its static readers: sum of w^2, `[k]`."""
    if static_spec(nodes) is None:
        return None
    weights = [get_tensor(gm, Linear.of(n).weight_name) for n in nodes]
    matrices = [m for w in weights for m in (w if w.dim() == 3 else (w,))]
    energy = torch.stack([m.float().square().sum(0) for m in matrices]).sum(0)
    return energy if energy.any() else torch.ones_like(energy)


def _experts(nodes: list[fx.Node]) -> int | None:
    """How many experts read the value; None where a matmul alone does."""
    return next((e.experts for e in map(ExpertLinear.match, nodes) if e is not None), None)


def static_spec(nodes: list[fx.Node]) -> QuantSpec | None:
    """The static activation that these readers of one value share, if they have one."""
    for node in nodes:
        activation = scheme_of(node).activation
        if activation is not None and not activation.dynamic:
            return activation
    return None
