"""The traced graph against the model that it was traced from, on small random inputs.

All other proofs compare one graph with another. This is the one that asks the model: it is called
as its user calls it, so that it makes its own mask and its own positions, with no past, with
padding, and with a past.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from panguq.data.inputs import prepare
from panguq.errors import TraceError, first_line
from panguq.ir.encoder import DEFAULTS, Examples, encoder_examples, let_return_no_cache
from panguq.ir.interface import Interface
from panguq.ir.kv_cache import cache_argument, cache_of
from panguq.ir.length_limits import changes_with_length, reset_rotary_frequencies, window_like_sizes
from panguq.ir.run import interpret
from panguq.tensors.dtypes import dtype_name
from panguq.trace_difference import (
    Positional,
    TracedCall,
    compare_fields,
    compare_logits,
    differs,
    largest_difference,
    not_deterministic,
    tolerance_of,
)

BATCH, PADDING, TOKENS = 2, 3, 24
SMALL_THRESHOLD = 128
LARGE_BYTES = 4 << 30
"""A model of more weights is run once instead of three times: each run reads all of them."""


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
            plain = TracedCall("a prompt", {"input_ids": ids}, prepare(interface, ids))
            compare_logits(plain, eager, gm)
        given = {"input_ids": ids[:, :past], "attention_mask": mask[:, :past], "use_cache": True}
        real = mask[:, :past].bool()
        inputs = prepare(interface, ids[:, :past], mask[:, :past])
        padded = TracedCall("a padded prompt", given, inputs, real)
        output, grown = compare_logits(padded, eager, gm)
        if weight_bytes_of(model) <= LARGE_BYTES:
            given = {"input_ids": ids[:, past:], "attention_mask": mask, "use_cache": True}
            given[cache_argument(model.forward)] = cache_of(output)
            inputs = prepare(interface, ids[:, past:], mask, past=grown)
            if "position_ids" in inspect.signature(model.forward).parameters:
                given["position_ids"] = inputs["position_ids"]  # as `generate` does
            compare_logits(TracedCall("tokens after a past", given, inputs), eager, gm)
        change = changes_with_length(model)
        if change is not None:
            positions = torch.arange(change - past, change - past + tokens).expand(BATCH, tokens)
            given = {"input_ids": ids, "position_ids": positions}
            inputs = prepare(interface, ids, position_ids=positions)
            compare_logits(TracedCall(f"positions beyond {change}", given, inputs), eager, gm)


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
            compare_fields(TracedCall("the example inputs", inputs, inputs), eager, gm, interface)
            return
        compare_fields(TracedCall("inputs without padding", needed, inputs), eager, gm, interface)
        if "attention_mask" in inputs and weight_bytes_of(model) <= LARGE_BYTES:
            mask = inputs["attention_mask"]
            mask[1, : min(PADDING, tokens - 2)] = mask[0, -1] = 0
            padded = TracedCall("inputs with padding", inputs, inputs, mask.bool())
            compare_fields(padded, eager, gm, interface)


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
        worst = max(
            (largest_difference(x, y) for x, y in zip(results, actual, strict=True)), default=0.0
        )
        if worst <= tolerance_of(model):
            continue
        if any(largest_difference(x, y) > 0 for x, y in zip(*calls, strict=True)):
            raise not_deterministic(name)
        positional = Positional(eager)
        call = TracedCall("the example inputs", {"inputs": list(examples)}, inputs)
        raise differs(call, positional, gm, worst, name)


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
