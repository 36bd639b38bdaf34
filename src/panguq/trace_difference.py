"""Where and by how much a graph differs from the model that it was traced from."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from panguq.errors import TraceError, first_line
from panguq.ir.analysis.choices import deciding_linears
from panguq.ir.edit import module_path
from panguq.ir.interface import Interface
from panguq.ir.run import interpret

TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the largest logit. bfloat16's is eight of its epsilons (2**-7 each, as much as reordered sums
make in a deep model), float16's the same number of its own; float32 and float64 take 1e-4."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class TracedCall:
    """One call of the model, and the same one of its graph. `real` `[batch, seq]` is False where
    a token is padding, whose logits may be anything."""

    what: str
    given: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    real: Tensor | None = None

    def eager(self, model: nn.Module) -> Any:
        """What the model returns. The arguments are copied, since a call may write to them."""
        with torch.no_grad():
            return model(**copy.deepcopy(dict(self.given)))


class Positional(nn.Module):
    """A module whose inputs come as one list, so that every call has named arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: list[Tensor]) -> Any:
        return self.model(*inputs)


def tolerance_of(model: nn.Module) -> float:
    """How far results may be off, of the largest one, at the coarsest of the model's dtypes."""
    return max((TOLERANCES.get(p.dtype, TOLERANCE) for p in model.parameters()), default=TOLERANCE)


def compare_logits(
    call: TracedCall, eager: nn.Module, gm: fx.GraphModule
) -> tuple[Any, list[Tensor]]:
    """What the model returned, and the cache that the graph did. Raises TraceError where the logits
    differ."""
    name = type(eager).__name__
    output = _eager_output(call, eager)
    logits, *grown = interpret.run(gm, call.inputs)
    expected, actual = _real(output.logits, call), _real(logits, call)
    worst = largest_difference(expected, actual)
    if worst > tolerance_of(eager) and _may_choose_otherwise(eager, gm):
        worst = _usual_difference(expected, actual)
    if worst > tolerance_of(eager):
        again = call.eager(eager)
        if largest_difference(_real(output.logits, call), _real(again.logits, call)) > 0:
            raise not_deterministic(name)
        raise differs(call, eager, gm, worst, name)
    return output, grown


def _eager_output(call: TracedCall, eager: nn.Module) -> Any:
    """What the model returns. Raises TraceError where it does not run."""
    try:
        return call.eager(eager)
    except Exception as error:
        raise TraceError(
            f"{type(eager).__name__} itself fails on {call.what}: {first_line(error, typed=True)}",
            "compile a model that runs; panguq compares its graph with it",
        ) from error


def compare_fields(
    call: TracedCall, eager: nn.Module, gm: fx.GraphModule, interface: Interface
) -> None:
    """Every output against the model's, which the interface names. Raises TraceError."""
    name = type(eager).__name__
    output = _eager_output(call, eager)
    actual = dict(zip(interface.outputs, interpret.run(gm, call.inputs), strict=True))
    for field, value in actual.items():
        worst = largest_difference(_real(output[field], call), _real(value, call))
        if worst > tolerance_of(eager):
            again = call.eager(eager)
            if largest_difference(_real(output[field], call), _real(again[field], call)) > 0:
                raise not_deterministic(name)
            raise differs(call, eager, gm, worst, name)


def _real(value: Any, call: TracedCall) -> Any:
    """The value at real tokens, if it has one for each token."""
    if call.real is None or not isinstance(value, Tensor) or value.shape[:2] != call.real.shape:
        return value
    return value[call.real]


def largest_difference(expected: Any, actual: Any) -> float:
    """The largest difference, of the largest expected value; of whole numbers, the share that
    differs. Infinities must be the same. Where the model itself yields NaN, there is nothing to
    compare."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return math.inf
    if expected.shape != actual.shape:
        return math.inf
    if not expected.is_floating_point() and not expected.is_complex():
        return float((expected != actual).double().mean()) if expected.numel() else 0.0
    finite = expected.isfinite()
    if bool(expected.isnan().any()):
        return 0.0
    if not torch.equal(expected[~finite], actual[~finite]):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    scale = expected[finite].abs().max().item() or 1.0
    worst = (expected[finite] - actual[finite]).abs().max().item() / scale
    return worst if math.isfinite(worst) else math.inf


def _may_choose_otherwise(eager: nn.Module, gm: fx.GraphModule) -> bool:
    """Whether a sum in another order may send a token to another expert: at 16 bits some scores of
    a router nearly tie, and what follows for that token is no measure of the graph."""
    return tolerance_of(eager) > TOLERANCE and bool(deciding_linears(gm))


def _usual_difference(expected: Tensor, actual: Tensor) -> float:
    """The difference at the median token, of the largest expected value."""
    if expected.shape != actual.shape or not bool(
        expected.isfinite().all() & actual.isfinite().all()
    ):
        return math.inf
    scale = expected.abs().max().item() or 1.0
    return float((expected - actual).abs().amax(-1).median()) / scale


def not_deterministic(name: str) -> TraceError:
    """The error for a model that gives two results for one input."""
    return TraceError(
        f"{name} gives two results for one input: it is random, or keeps a state between calls",
        "a compiled graph gives the same result at every call; switch that off, or pass the state "
        "in and return it",
    )


def differs(
    call: TracedCall, eager: nn.Module, gm: fx.GraphModule, worst: float, name: str
) -> TraceError:
    """The error for a graph that is `worst` off on a call. It names the first module that is."""
    first = _first_module(call, eager, gm)
    return TraceError(
        f"the graph of {name} does not compute what {name} does: on {call.what} it differs by "
        f"{worst:.2g} of the largest value; the first module that differs is "
        f"{first or 'its own forward'}",
        "the module may read its mask, its cache or its inputs in a way that a trace does not "
        "show; panguq does not serve it",
    )


def _first_module(call: TracedCall, eager: nn.Module, gm: fx.GraphModule) -> str | None:
    """The first module, in the order in which they finish, none of whose values is its output."""
    computed: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            path = module_path(node)
            while path:
                computed.setdefault(path, []).append(node)
                path = path.rpartition(".")[0]
    outputs = _module_outputs(call, eager)
    wanted = {node for path, _, _ in outputs for node in computed.get(path, ())}
    values = interpret.values(gm, call.inputs, wanted)
    tolerance = tolerance_of(eager)
    for path, kind, output in outputs:
        candidates = [values[node] for node in computed.get(path, ())]
        pairs = (_expanded(output, value) for value in candidates)
        alike = (largest_difference(_real(x, call), _real(y, call)) for x, y in pairs)
        if candidates and not any(worst <= tolerance for worst in alike):
            return f"{path} ({kind})"
    return None


def _expanded(expected: Tensor, actual: Any) -> tuple[Tensor, Any]:
    """Both, each expanded to the other's sizes where it has 1: the model may share over the batch
    what the graph computes for each row."""
    try:
        return tuple(torch.broadcast_tensors(expected, actual))
    except RuntimeError:
        return expected, actual


def _module_outputs(call: TracedCall, eager: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Path, class and first tensor of every module's output, in the order in which they finish."""
    outputs: list[tuple[str, str, Tensor]] = []
    hooks = []
    root = eager.model if isinstance(eager, Positional) else eager
    for path, module in root.named_modules():

        def keep(module: nn.Module, _: Any, output: Any, path: str = path) -> None:
            first = next((x for x in tree_leaves(output) if isinstance(x, Tensor)), None)
            if path and first is not None:
                outputs.append((path, type(module).__name__, first.clone()))

        hooks.append(module.register_forward_hook(keep))
    try:
        call.eager(eager)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
