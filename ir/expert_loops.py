"""Mixtures of experts that a model computes in a loop over a list of modules.

Each turn takes the rows that go to its expert: how many follows from values, which no graph of any
size can show.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from panguq.errors import TraceError
from panguq.ir.call_arguments import argument, calls

PICKS_ROWS = ("aten::nonzero", "aten::nonzero_numpy", "aten::where", "aten::masked_select")


def looped_experts(module: nn.Module) -> str:
    """The module's own list of modules that have equal weights, by name; empty if there is none."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            forms = {tuple((n, tuple(p.shape)) for n, p in m.named_parameters()) for m in child}
            if len(forms) == 1 and next(iter(forms)):
                return name
    return ""


def loop_error(path: str, module: nn.Module) -> TraceError:
    """That this module, at `path`, is a loop over its experts."""
    return TraceError(
        f"module {path} ({type(module).__name__}) loops over its list {looped_experts(module)!r} "
        "and picks the rows for each by their values: a mixture of experts that no graph can show",
        "stack the weights of all experts, [experts, n, k], in a module that transformers calls "
        "through its interface (use_experts_implementation), as it does for the families that it "
        "has",
    )


def _by_mask(node: fx.Node) -> bool:
    if not calls(node, "aten::index.Tensor"):
        return False
    picked: Any = argument(node, 1)
    return any(isinstance(n, fx.Node) and n.meta["val"].dtype == torch.bool for n in picked)


def refuse_loops(nodes: Iterable[fx.Node], model: nn.Module) -> None:
    """Raises TraceError, naming the module, for one of these nodes that picks rows for experts."""
    for node in nodes:
        if not any(calls(node, op) for op in PICKS_ROWS) and not _by_mask(node):
            continue
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = str(stack[-1][0]) if stack else ""
        module = model.get_submodule(path)
        if looped_experts(module):
            raise loop_error(path, module)
