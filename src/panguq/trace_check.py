"""The traced graph against the model that it was traced from, on small random inputs.

All other proofs compare one graph with another. This is the one that asks the model: it is called
as its user calls it, so that it makes its own mask and its own positions, with no past, with
padding, and with a past.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from panguq.data.inputs import prepare
from panguq.errors import TraceError, first_line
from panguq.ir.analysis.choices import deciding_linears
from panguq.ir.edit import module_path
from panguq.ir.encoder import DEFAULTS, Examples, encoder_examples, let_return_no_cache
from panguq.ir.interface import Interface
from panguq.ir.kv_cache import cache_argument, cache_of
from panguq.ir.length_limits import (
    changes_with_length,
    reset_rotary_frequencies,
    window_like_sizes,
)
from panguq.ir.run import interpret
from panguq.tensors.dtypes import dtype_name

TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the largest logit. bfloat16's is eight of its epsilons (2**-7 each, as much as reordered sums
make in a deep model), float16's the same number of its own; float32 and float64 take 1e-4."""
TOLERANCE = 1e-4
BATCH, PADDING, TOKENS = 2, 3, 24
SMALL_THRESHOLD = 128
LARGE_BYTES = 4 << 30
"""A model of more weights is run once instead of three times: each run reads all of them."""


@dataclass(frozen=True)
class _Call:
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


def has_weights(model: nn.Module) -> bool:
    """Whether the model can run: a skeleton's tensors are fake."""
    tensors = [*model.parameters(), *model.buffers()]
    return not any(isinstance(t, FakeTensor) or t.is_meta for t in tensors)


def check_causal_lm(model: Any, gm: fx.GraphModule, interface: Interface) -> None:
    """Raises TraceError, naming the first module that differs, unless the logits are the model's.

    A prompt without a mask, one with left padding, and a step that follows it; where the rotary
    frequencies depend on the length, positions at which they change, too.
    """
    eager = _copy(model)
    tokens = _tokens(model, interface)
    past = tokens // 2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, interface.vocab_size or 2, (BATCH, tokens), generator=generator)
    mask = torch.ones(BATCH, tokens, dtype=torch.long)
    mask[1, : min(PADDING, past - 1)] = 0
    with torch.random.fork_rng(devices=[]):
        if weight_bytes_of(model) <= LARGE_BYTES:
            plain = _Call("a prompt", {"input_ids": ids}, prepare(interface, ids))
            _compare_logits(plain, eager, gm)
        given = {"input_ids": ids[:, :past], "attention_mask": mask[:, :past], "use_cache": True}
        real = mask[:, :past].bool()
        inputs = prepare(interface, ids[:, :past], mask[:, :past])
        padded = _Call("a padded prompt", given, inputs, real)
        output, grown = _compare_logits(padded, eager, gm)
        if weight_bytes_of(model) <= LARGE_BYTES:
            given = {"input_ids": ids[:, past:], "attention_mask": mask, "use_cache": True}
            given[cache_argument(model.forward)] = cache_of(output)
            inputs = prepare(interface, ids[:, past:], mask, past=grown)
            if "position_ids" in inspect.signature(model.forward).parameters:
                given["position_ids"] = inputs["position_ids"]  # as `generate` does
            _compare_logits(_Call("tokens after a past", given, inputs), eager, gm)
        change = changes_with_length(model)
        if change is not None:
            positions = torch.arange(change - past, change - past + tokens).expand(BATCH, tokens)
            given = {"input_ids": ids, "position_ids": positions}
            inputs = prepare(interface, ids, position_ids=positions)
            _compare_logits(_Call(f"positions beyond {change}", given, inputs), eager, gm)


def check_encoder(
    model: Any, gm: fx.GraphModule, interface: Interface, given: Examples = None
) -> None:
    """As `check_causal_lm`, for a transformers model without a cache: all outputs, on inputs of
    other sizes than the trace's, once as its user leaves out what has a default, and once with
    padding at either end."""
    eager: Any = _copy(model)
    let_return_no_cache(eager)
    tokens = _tokens(model, interface)
    inputs = encoder_examples(model, given, BATCH, tokens)
    needed = {name: x for name, x in inputs.items() if name not in DEFAULTS}
    with torch.random.fork_rng(devices=[]):
        if given is not None:
            _compare_fields(_Call("the example inputs", inputs, inputs), eager, gm, interface)
            return
        _compare_fields(_Call("inputs without padding", needed, inputs), eager, gm, interface)
        if "attention_mask" in inputs and weight_bytes_of(model) <= LARGE_BYTES:
            mask = inputs["attention_mask"]
            mask[1, : min(PADDING, tokens - 2)] = mask[0, -1] = 0
            padded = _Call("inputs with padding", inputs, inputs, mask.bool())
            _compare_fields(padded, eager, gm, interface)


def check_module(
    model: nn.Module, gm: fx.GraphModule, interface: Interface, examples: Sequence[Tensor]
) -> None:
    """As `check_causal_lm`, for any module on its example inputs. It runs twice: no result may
    follow from the call before."""
    eager = _copy(model)
    inputs = dict(zip(interface.inputs, (x.clone() for x in examples), strict=True))
    name = type(model).__name__
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            calls = [tree_leaves(eager(*(x.clone() for x in examples))) for _ in range(2)]
        except Exception as error:
            dtypes = sorted({dtype_name(p.dtype) for p in model.parameters()})
            raise TraceError(
                f"{name} itself fails on the example inputs: {first_line(error, typed=True)}",
                f"its weights are {', '.join(dtypes)}, after a cast for the target or dtype=; "
                "give example inputs that it takes",
            ) from error
    actual = interpret.run(gm, inputs)
    for results in calls:
        worst = max((_difference(x, y) for x, y in zip(results, actual, strict=True)), default=0.0)
        if worst <= _tolerance(model):
            continue
        if any(_difference(x, y) > 0 for x, y in zip(*calls, strict=True)):
            raise _not_deterministic(name)
        positional = _Positional(eager)
        call = _Call("the example inputs", {"inputs": list(examples)}, inputs)
        raise _differs(call, positional, gm, worst, name)


class _Positional(nn.Module):
    """A module whose inputs come as one list, so that every call has named arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: list[Tensor]) -> Any:
        return self.model(*inputs)


def _copy(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with buffers of its own: a forward may write to them."""
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    reset_rotary_frequencies(copied)
    return copied


def weight_bytes_of(model: nn.Module) -> int:
    """Of all parameters together."""
    return sum(p.nbytes for p in model.parameters())


def _tokens(model: Any, interface: Interface) -> int:
    """Long enough to cross the small thresholds in the config, at which a forward may branch."""
    crossed = [size + 8 for size in window_like_sizes(model.config) if size <= SMALL_THRESHOLD]
    names = ("max_position_embeddings", "max_seq_len")
    ends = [interface.max_positions, *(getattr(model.config, name, None) for name in names)]
    return min([max([TOKENS, *crossed]), *(int(end) for end in ends if end)])


def _tolerance(model: nn.Module) -> float:
    return max((TOLERANCES.get(p.dtype, TOLERANCE) for p in model.parameters()), default=TOLERANCE)


def _compare_logits(call: _Call, eager: nn.Module, gm: fx.GraphModule) -> tuple[Any, list[Tensor]]:
    """What the model returned, and the cache that the graph did."""
    name = type(eager).__name__
    output = _eager_output(call, eager)
    logits, *grown = interpret.run(gm, call.inputs)
    expected, actual = _real(output.logits, call), _real(logits, call)
    worst = _difference(expected, actual)
    if worst > _tolerance(eager) and _may_choose_otherwise(eager, gm):
        worst = _usual_difference(expected, actual)
    if worst > _tolerance(eager):
        again = call.eager(eager)
        if _difference(_real(output.logits, call), _real(again.logits, call)) > 0:
            raise _not_deterministic(name)
        raise _differs(call, eager, gm, worst, name)
    return output, grown


def _eager_output(call: _Call, eager: nn.Module) -> Any:
    """What the model returns. Raises TraceError where it does not run."""
    try:
        return call.eager(eager)
    except Exception as error:
        raise TraceError(
            f"{type(eager).__name__} itself fails on {call.what}: {first_line(error, typed=True)}",
            "compile a model that runs; panguq compares its graph with it",
        ) from error


def _compare_fields(
    call: _Call, eager: nn.Module, gm: fx.GraphModule, interface: Interface
) -> None:
    """Every output against the model's, which the interface names."""
    name = type(eager).__name__
    output = _eager_output(call, eager)
    actual = dict(zip(interface.outputs, interpret.run(gm, call.inputs), strict=True))
    for field, value in actual.items():
        worst = _difference(_real(output[field], call), _real(value, call))
        if worst > _tolerance(eager):
            again = call.eager(eager)
            if _difference(_real(output[field], call), _real(again[field], call)) > 0:
                raise _not_deterministic(name)
            raise _differs(call, eager, gm, worst, name)


def _real(value: Any, call: _Call) -> Any:
    """The value at real tokens, if it has one for each token."""
    if call.real is None or not isinstance(value, Tensor) or value.shape[:2] != call.real.shape:
        return value
    return value[call.real]


def _difference(expected: Any, actual: Any) -> float:
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
    return _tolerance(eager) > TOLERANCE and bool(deciding_linears(gm))


def _usual_difference(expected: Tensor, actual: Tensor) -> float:
    """The difference at the median token, of the largest expected value."""
    if expected.shape != actual.shape or not bool(
        expected.isfinite().all() & actual.isfinite().all()
    ):
        return math.inf
    scale = expected.abs().max().item() or 1.0
    return float((expected - actual).abs().amax(-1).median()) / scale


def _not_deterministic(name: str) -> TraceError:
    return TraceError(
        f"{name} gives two results for one input: it is random, or keeps a state between calls",
        "a compiled graph gives the same result at every call; switch that off, or pass the state "
        "in and return it",
    )


def _differs(
    call: _Call, eager: nn.Module, gm: fx.GraphModule, worst: float, name: str
) -> TraceError:
    first = _first_module(call, eager, gm)
    return TraceError(
        f"the graph of {name} does not compute what {name} does: on {call.what} it differs by "
        f"{worst:.2g} of the largest value; the first module that differs is "
        f"{first or 'its own forward'}",
        "the module may read its mask, its cache or its inputs in a way that a trace does not "
        "show; panguq does not serve it",
    )


def _first_module(call: _Call, eager: nn.Module, gm: fx.GraphModule) -> str | None:
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
    tolerance = _tolerance(eager)
    for path, kind, output in outputs:
        candidates = [values[node] for node in computed.get(path, ())]
        pairs = (_expanded(output, value) for value in candidates)
        alike = (_difference(_real(x, call), _real(y, call)) for x, y in pairs)
        if candidates and not any(difference <= tolerance for difference in alike):
            return f"{path} ({kind})"
    return None


def _expanded(expected: Tensor, actual: Any) -> tuple[Tensor, Any]:
    """Both, each expanded to the other's sizes where it has 1: the model may share over the batch
    what the graph computes for each row."""
    try:
        return tuple(torch.broadcast_tensors(expected, actual))
    except RuntimeError:
        return expected, actual


def _module_outputs(call: _Call, eager: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Path, class and first tensor of every module's output, in the order in which they finish."""
    outputs: list[tuple[str, str, Tensor]] = []
    hooks = []
    root = eager.model if isinstance(eager, _Positional) else eager
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
