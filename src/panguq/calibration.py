"""Calibration data: texts, token ids or batches from the user, or sampled from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from panguq.errors import InputError
from panguq.inputs import empty_past, prepare, takes_empty_mask
from panguq.ir import interpret
from panguq.ir.interface import Interface

WINDOWS, WINDOW = 16, 512
SAMPLED_SEQUENCES, SAMPLED_TOKENS = 8, 256
SHORTEST = 8

Batches = list[dict[str, Tensor]]


def token_windows(text: str, tokenizer: Any, window: int, windows: int) -> Tensor:
    """The first `windows` non-overlapping windows of a text's tokens, `[windows, window]`.

    A tokenizer that puts BOS first does so in every window. Raises InputError if the text is
    too short for one window of at least 8 tokens.
    """
    if window < SHORTEST or windows < 1:
        raise InputError(
            f"{windows} windows of {window} tokens say nothing",
            f"take at least one window of at least {SHORTEST} tokens",
        )
    limit = window * windows * 12  # characters: more than enough, and a bound on the work
    ids = tokenizer(text[:limit], add_special_tokens=False).input_ids
    bos = bos_prefix(tokenizer)
    body = window - len(bos)
    count = min(windows, len(ids) // body)
    if count == 0:
        if len(ids) < SHORTEST:
            raise InputError(
                f"the text has {len(ids)} tokens; {SHORTEST} are the least that says anything",
                "give a longer text",
            )
        return torch.tensor([[*bos, *ids]])
    rows = [[*bos, *ids[i * body : (i + 1) * body]] for i in range(count)]
    return torch.tensor(rows)


def bos_prefix(tokenizer: Any) -> list[int]:
    """[BOS] if this tokenizer's habit is to start with it, else []."""
    start = tokenizer("a").input_ids[:1]
    return start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []


def causal_lm_batches(
    data: Any, interface: Interface, tokenizer: Any = None, empty_mask: bool = True
) -> Batches:
    """Graph inputs for every sequence in `data`.

    `data` may be a text, an iterable of texts (with a `tokenizer`), a tensor of token ids
    `[sequences, seq]`, or an iterable of such tensors, of lists of ids, or of mappings with
    `input_ids` and perhaps `attention_mask`. Raises InputError for anything else, and where
    nothing usable is left.
    """
    if isinstance(data, str):
        return causal_lm_batches(
            token_windows(data, _needed(tokenizer), WINDOW, WINDOWS), interface, None, empty_mask
        )
    if isinstance(data, Tensor):
        data = [data] if data.dim() < 2 else list(data.split(1))
    if isinstance(data, Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise InputError(
            f"calibration data is a {type(data).__name__}",
            "give texts with a tokenizer, token ids, or batches with input_ids",
        )
    batches = []
    for index, item in enumerate(data):
        for ids in _without_padding(*_ids_and_mask(item, index, tokenizer), index):
            batches.append(prepare(interface, ids, empty_mask=empty_mask, logits_to_keep=1))
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    if tokens < SHORTEST:
        raise InputError(
            f"the calibration data is empty or too short: {tokens} tokens in {len(batches)} "
            "sequences",
            f"give at least {SHORTEST} tokens; {WINDOWS} sequences of {WINDOW} are a good start",
        )
    return batches


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise InputError("calibration texts need a tokenizer", "pass tokenizer=")
    return tokenizer


def _ids_and_mask(item: Any, index: int, tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(item, str):
        ids = _needed(tokenizer)(item, return_tensors="pt").input_ids[:, : WINDOW * 4]
        return ids, None
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise InputError(f"calibration batch {index} has no input_ids: {sorted(item)}")
        mask = item.get("attention_mask")
        item = item["input_ids"]
    try:
        ids = item if isinstance(item, Tensor) else torch.tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"calibration item {index} is a {type(item).__name__}, not text or token ids"
        ) from error
    return (ids[None] if ids.dim() == 1 else ids), mask


def _without_padding(ids: Tensor, mask: Tensor | None, index: int) -> list[Tensor]:
    """The sequences of a batch, each `[1, its real tokens]`: padding must not be observed."""
    if mask is None:
        return [ids]
    mask = torch.as_tensor(mask).reshape(ids.shape[0], -1).bool()
    if mask.shape != ids.shape:
        raise InputError(
            f"calibration batch {index}: attention_mask has shape {list(mask.shape)}, "
            f"input_ids {list(ids.shape)}"
        )
    if bool(mask.all()):
        return [ids]
    rows = [row[real][None] for row, real in zip(ids, mask, strict=True)]
    return [row for row in rows if row.numel()]


def module_batches(data: Any, interface: Interface) -> Batches:
    """Graph inputs from an iterable of input tuples (or single tensors) of any module."""
    batches = []
    for index, item in enumerate(data):
        tensors = (item,) if isinstance(item, Tensor) else tuple(item)
        if len(tensors) != len(interface.inputs):
            raise InputError(
                f"calibration item {index} has {len(tensors)} tensors, the module takes "
                f"{len(interface.inputs)}"
            )
        batches.append(dict(zip(interface.inputs, tensors, strict=True)))
    if not batches:
        raise InputError("the calibration data is empty", "give at least one input")
    return batches


def sample_sequences(
    gm: fx.GraphModule,
    interface: Interface,
    start: int,
    generator: torch.Generator,
    sequences: int,
    tokens: int,
    progress: Callable[[str, int, int], None],
) -> Tensor:
    """Token ids `[sequences, tokens]` drawn from the model itself at temperature 1."""
    empty_mask = takes_empty_mask(gm)
    ids = torch.full((sequences, 1), start)
    step, past = ids, empty_past(interface, sequences)
    if interface.max_positions is not None:
        tokens = min(tokens, interface.max_positions)
    for done in range(1, tokens):
        progress("sample calibration data from the model", done, tokens - 1)
        inputs = prepare(interface, step, past=past, logits_to_keep=1, empty_mask=empty_mask)
        logits, *past = interpret.run(gm, inputs)
        if not torch.isfinite(logits).all():
            culprit = interpret.first_non_finite(gm, inputs)
            from panguq.errors import NumericsError

            raise NumericsError(
                f"the model yields NaN or Inf: first at {culprit}",
                "check the checkpoint's weights, or give calibration data it can process",
            )
        probabilities = logits[:, -1].float().softmax(-1)
        step = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat((ids, step), dim=1)
    return ids


def probe_of(
    batches: Sequence[dict[str, Tensor]], interface: Interface, tokens: int = 64
) -> dict[str, Tensor]:
    """The start of the first batch, small enough to run several graphs on."""
    first = batches[0]
    if interface.kind != "causal_lm":
        return first
    ids = first["input_ids"][:1, :tokens]
    empty = first["attention_mask"].numel() == 0
    return prepare(interface, ids, empty_mask=empty)
