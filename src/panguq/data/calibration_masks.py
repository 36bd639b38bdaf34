"""Attention masks of calibration batches: what they keep, and every form that they may not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panguq.errors import InputError

_FORM = "give [batch, seq] as input_ids, 1 where a token is real and 0 where it is padding"


def without_padding(ids: Tensor, mask: Any, where: str) -> list[Tensor]:
    """The sequences of a batch `[batch, seq]` or `[seq]`: padding must not be observed.

    Without padding the batch stays whole, `[batch, seq]`; otherwise each sequence is `[1, its real
    tokens]`. Raises InputError, naming `where`, for a mask that is not exactly one 0 or 1 a token,
    for a row that keeps nothing, and for one with padding between its tokens.
    """
    batch = ids[None] if ids.dim() == 1 else ids
    if mask is None:
        return [batch]
    real = _real_tokens(mask, ids, where).reshape(batch.shape)
    if bool(real.all()):
        return [batch]
    for index, row in enumerate(real):
        _check_row(row, f"{where}: row {index} of attention_mask {list(real.shape)}")
    return [row[keep][None] for row, keep in zip(batch, real, strict=True)]


def _real_tokens(mask: Any, ids: Tensor, where: str) -> Tensor:
    """The mask as booleans of the ids' shape."""
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: attention_mask is ragged or holds no numbers", _FORM) from error
    if mask.shape != ids.shape:
        raise InputError(
            f"{where}: attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}",
            _FORM,
        )
    real: Tensor = mask == 1
    if not bool((real | (mask == 0)).all()):
        value = mask[~(real | (mask == 0))][0].item()
        raise InputError(f"{where}: attention_mask holds {value}, not only 0 and 1", _FORM)
    return real


def _check_row(real: Tensor, what: str) -> None:
    count = int(real.sum())
    if count == 0:
        raise InputError(f"{what} keeps no token", _FORM)
    first, last = (int(real.nonzero()[end]) for end in (0, -1))
    if last - first + 1 != count:
        raise InputError(f"{what} has padding between its tokens", _FORM)
