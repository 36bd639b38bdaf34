"""The graph's inputs for calibration, from the user's data or sampled from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from panguq.data.calibration_data import WINDOW, WINDOWS, CalibrationData, read_calibration
from panguq.data.calibration_modules import items, module_batches
from panguq.data.calibration_rows import Ids
from panguq.data.calibration_tokens import bos_prefix, token_windows
from panguq.data.encoder_inputs import prepare_encoder
from panguq.data.inputs import empty_past, prepare, takes_empty_mask
from panguq.errors import InputError, NumericsError
from panguq.ir.interface import Interface
from panguq.ir.run import interpret

SAMPLED_SEQUENCES, SAMPLED_TOKENS = 8, 256

Batches = list[dict[str, Tensor]]

__all__ = [
    "SAMPLED_SEQUENCES",
    "SAMPLED_TOKENS",
    "WINDOW",
    "WINDOWS",
    "Batches",
    "bos_prefix",
    "causal_lm_batches",
    "encoder_batches",
    "module_batches",
    "probe_of",
    "sample_sequences",
    "token_windows",
]


def causal_lm_batches(
    data: Any, interface: Interface, tokenizer: Any = None, empty_mask: bool = True
) -> Batches:
    """Graph inputs for every sequence in `data`, which `read_calibration` reads.

    Raises InputError, naming the item, for what is no calibration data, and for token ids that the
    model does not have or more of them than it has positions.
    """
    read = read_calibration(data, tokenizer, longest=interface.max_positions)
    return [_prepared(row, interface, empty_mask) for row in read.sequences]


def _prepared(row: Ids, interface: Interface, empty_mask: bool) -> dict[str, Tensor]:
    try:
        return prepare(interface, row.ids, empty_mask=empty_mask, logits_to_keep=1)
    except InputError as error:
        length, most = row.ids.shape[1], interface.max_positions
        if most is not None and length > most:
            raise InputError(
                f"{row.where} has {length} tokens, the model takes {most}",
                "cut it; files are cut to windows (--window)",
            ) from None
        raise InputError(f"{row.where}: {error.message}", error.hint) from None


def encoder_batches(data: Any, interface: Interface) -> Batches:
    """Graph inputs of an encoder for every row of text that was read, or every mapping (or tensors
    in a row) of inputs, of which the graph's are taken. Raises InputError, naming the item."""
    batches = []
    for where, given in _encoder_rows(data, interface):
        try:
            batches.append(prepare_encoder(interface, given))
        except InputError as error:
            raise InputError(f"{where}: {error.message}", error.hint) from None
    if not batches:
        raise InputError("the calibration data is empty", f"give {', '.join(interface.inputs)}")
    return batches


def _encoder_rows(data: Any, interface: Interface) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(data, CalibrationData):
        for row in data.sequences:
            given = {"input_ids": row.ids, "token_type_ids": row.types}
            taken = {k: x for k, x in given.items() if x is not None and k in interface.inputs}
            yield row.where, taken
        return
    for where, item in items(data):
        if isinstance(item, Mapping):
            yield where, {name: item[name] for name in interface.inputs if name in item}
        else:
            values = item if isinstance(item, list | tuple) else (item,)
            yield where, dict(zip(interface.inputs, values, strict=False))


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
