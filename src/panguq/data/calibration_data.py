"""Calibration data of every form that people have, as token ids that say where they came from."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panguq.compile_report import CalibrationSummary
from panguq.data.calibration_files import json_lines, named_file, rows_of_file
from panguq.data.calibration_rows import Empty, Ids, Row, Text, items_of, rows_of
from panguq.data.calibration_tokens import (
    SHORTEST,
    bos_prefix,
    check_windows,
    encode_text,
    follows_bos,
    most_characters,
    pieces,
    too_short,
)
from panguq.errors import InputError

logger = logging.getLogger("panguq")

WINDOWS, WINDOW = 16, 512
LONGEST = 4 * WINDOW
MOST_TOKENS = 1 << 18
MOST_ITEMS = 1 << 16
FEW = 32
HELD_OUT, HELD_OUT_ROWS = 64, 4
GIVEN = "given by the caller"


@dataclass(frozen=True)
class CalibrationData:
    """Token ids, each `[batch, seq]` with the name of where it stood, and what is said of all.

    `held_out` are a few rows of ids of the text behind, for the comparison at the end of a compile.
    """

    sequences: tuple[Ids, ...]
    summary: CalibrationSummary
    held_out: tuple[Tensor, ...] = ()


def read_calibration(
    data: Any,
    tokenizer: Any = None,
    window: int = WINDOW,
    windows: int = WINDOWS,
    longest: int | None = None,
) -> CalibrationData:
    """Read calibration data of a causal language model; docs/calibration.md lists the forms.

    A file's texts, or one text, are joined and cut into the first `windows` windows of `window`
    tokens; the last one may be shorter. Rows in memory are a sequence each; texts longer than 2048
    tokens are cut. `longest` is the most tokens that a sequence of text may have for the model. Of
    what is read piece by piece (data sets, generators, texts) at most 262144 tokens are taken, with
    a warning; token ids in a tensor or a list are taken whole.

    Raises InputError, naming the item or the line, for anything that is no calibration data, for a
    text of fewer than 8 tokens, which may be a name, and where nothing is left.
    """
    if isinstance(data, CalibrationData):
        return data
    window = min(window, longest or window)
    check_windows(window, windows)
    path = named_file(data)
    if path is not None:
        taken = _windows(file_rows(path, tokenizer, window, windows), tokenizer, window, windows)
        return taken.finish(str(path), tokenizer)
    if isinstance(data, str):
        rows = [Text("the calibration text", data)] if data.strip() else []
        return _windows(rows, tokenizer, window, windows).finish(GIVEN, tokenizer)
    return _sequences(data, tokenizer, min(LONGEST, longest or LONGEST)).finish(GIVEN, tokenizer)


def file_rows(
    path: Path, tokenizer: Any, window: int, windows: int, lines: bool = False
) -> Iterator[Row]:
    """The rows of a file; with `lines` each line is JSON whatever the file's name says."""
    characters = most_characters(window, windows) + 1
    for where, row in json_lines(path) if lines else rows_of_file(path, characters):
        if isinstance(row, str):
            yield Text(where or str(path), row) if row.strip() else Empty(where)
        else:
            yield from rows_of(row, where, tokenizer)


def file_text(path: Path, tokenizer: Any, window: int, windows: int, chat: bool = False) -> str:
    """The texts of a file as one, long enough for these windows; "" where it has none.

    With `chat`, each line is a conversation, whatever the file's name says. Raises InputError,
    naming the file and the line, for what cannot be read.
    """
    check_windows(window, windows)
    rows = file_rows(path, tokenizer, window, windows, lines=chat)
    return joined(_only_chats(rows) if chat else rows, most_characters(window, windows))[0]


def _only_chats(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, Text) and not row.is_chat:
            raise InputError(f"{row.where} has no list of messages", "see panguq eval --help")
        yield row


def joined(rows: Iterable[Row], characters: int) -> tuple[str, int, bool]:
    """Texts as one text of at most `characters`; how many were empty; whether more was there."""
    parts: list[str] = []
    length = empty = 0
    for row in rows:
        if length >= characters:
            return "".join(parts)[:characters], empty, True
        if isinstance(row, Ids):
            raise InputError(f"{row.where} holds token ids", "do not mix them with texts")
        if isinstance(row, Empty):
            empty += 1
            continue
        parts.append(row.text if row.is_chat else f"{row.text.strip()}\n\n")
        length += len(parts[-1])
    text = "".join(parts).rstrip()
    return text[:characters], empty, len(text) > characters


@dataclass
class _Taken:
    """What was taken so far."""

    sequences: list[Ids] = field(default_factory=list)
    empty: int = 0
    cut: int = 0
    dropped: int = 0
    more: bool = False
    first: str = ""
    held_out: list[Tensor] = field(default_factory=list)

    def finish(self, source: str, tokenizer: Any) -> CalibrationData:
        """Raises InputError where too little was taken."""
        tokens = sum(row.ids.numel() for row in self.sequences)
        count = sum(len(row.ids) for row in self.sequences)
        if not tokens:
            said = f", {self.empty} empty rows skipped" if self.empty else ""
            what = "the calibration data is" if source == GIVEN else f"{source}:"
            raise InputError(
                f"{what} empty: no tokens{said}",
                f"{WINDOWS} sequences of {WINDOW} tokens are a good start",
            )
        if tokens < FEW:
            logger.warning(
                "calibration data: %d tokens say little; %d sequences of %d are a good start",
                *(tokens, WINDOWS, WINDOW),
            )
        self._warn_of_padding(tokenizer)
        first = self.first or decoded(tokenizer, self.sequences[0].ids[0])
        summary = CalibrationSummary(
            source=source,
            sequences=count,
            tokens=tokens,
            skipped_empty=self.empty,
            cut_rows=self.cut,
            dropped_tokens=self.dropped,
            more_left=self.more,
            first_80_characters=first[:80],
        )
        return CalibrationData(tuple(self.sequences), summary, tuple(self.held_out))

    def _warn_of_padding(self, tokenizer: Any) -> None:
        """Padding without a mask is observed as if it were text."""
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is None or pad == getattr(tokenizer, "eos_token_id", None):
            return
        ends = [row.ids[:, part] for row in self.sequences for part in (slice(2), slice(-2, None))]
        padded = sum(int((end == pad).all(1).sum()) for end in ends if end.shape[1] == 2)
        if padded:
            logger.warning(
                "calibration data: %d sequences begin or end with padding and no attention_mask "
                "says so; it is calibrated on as text",
                padded,
            )

    def add_text(self, row: Text, tokenizer: Any, longest: int, prefix: list[int]) -> None:
        special = follows_bos(tokenizer) if row.is_chat else True
        ids = encode_text(tokenizer, row.text, special, row.where)
        if not ids:
            self.empty += 1
            return
        parts = [ids]
        if len(ids) > longest:
            self.cut += 1
            parts, dropped, _ = pieces(ids, longest, prefix)
            self.dropped += dropped
        self.first = self.first or row.text
        self.sequences += [Ids(row.where, torch.tensor([part])) for part in parts]


def decoded(tokenizer: Any, ids: Tensor) -> str:
    """The text of the first tokens, "" where the tokenizer cannot say it."""
    try:
        return str(tokenizer.decode(ids[:80].tolist()))[:80]
    except Exception:  # no tokenizer, or ids that it does not have: those are refused elsewhere
        return ""


def _windows(rows: Iterable[Row], tokenizer: Any, window: int, windows: int) -> _Taken:
    """The first windows of texts, one behind the other, or of rows of ids, each by itself."""
    taken = _Taken()
    rows = iter(rows)
    for row in rows:
        if isinstance(row, Ids):
            _cut_ids(itertools.chain([row], rows), taken, window, windows)
            return taken
        if isinstance(row, Text):
            break
        taken.empty += 1
    else:
        return taken
    text, empty, taken.more = joined(itertools.chain([row], rows), most_characters(window, windows))
    taken.empty += empty
    ids = encode_text(tokenizer, text, special=False, where=row.where)
    if len(ids) < SHORTEST:
        raise too_short(len(ids), row.where.partition(": ")[0])
    prefix = bos_prefix(tokenizer)
    parts, taken.dropped, more = pieces(ids, window, prefix, windows)
    taken.more = taken.more or more
    behind = ids[windows * (window - len(prefix)) + len(prefix) :]
    if len(behind) >= SHORTEST:
        held_out, _, _ = pieces(behind, min(window, HELD_OUT), prefix, HELD_OUT_ROWS)
        taken.held_out = [torch.tensor(row) for row in held_out]
    taken.first = text
    taken.sequences = [
        Ids(f"calibration window {index}", torch.tensor([part])) for index, part in enumerate(parts)
    ]
    return taken


def _cut_ids(rows: Iterable[Row], taken: _Taken, window: int, windows: int) -> None:
    for row in rows:
        if len(taken.sequences) >= windows:
            taken.more = True
            return
        if isinstance(row, Text):
            raise InputError(f"{row.where} holds a text", "do not mix texts and token ids")
        if isinstance(row, Empty):
            taken.empty += 1
            continue
        for index, ids in enumerate(row.ids.tolist()):
            left = windows - len(taken.sequences)
            parts, dropped, more = pieces(ids, window, [], left)
            taken.dropped += dropped
            taken.cut += len(ids) > window
            taken.more = taken.more or more
            kinds: list[list[int] | None] = [None] * len(parts)
            if row.types is not None:
                kinds = [*pieces(row.types.tolist()[index], window, [], left)[0]]
            taken.sequences += [
                Ids(row.where, torch.tensor([part]), None if kind is None else torch.tensor([kind]))
                for part, kind in zip(parts, kinds, strict=True)
            ]


def _sequences(data: Any, tokenizer: Any, longest: int) -> _Taken:
    """Every row of data in memory, up to the limits of what is read piece by piece."""
    taken = _Taken()
    is_whole = isinstance(data, list | tuple | Tensor) or hasattr(data, "__array__")
    prefix: list[int] | None = None
    read = 0
    for index, (where, item) in enumerate(items_of(data)):
        if read >= MOST_TOKENS or (index >= MOST_ITEMS and not is_whole):
            taken.more = True
            logger.warning(
                "calibration data: the first %d items are taken, and the rest is left; give token "
                "ids in one tensor to use more",
                index,
            )
            break
        for row in rows_of(item, where, tokenizer):
            if isinstance(row, Empty):
                taken.empty += 1
            elif isinstance(row, Ids):
                taken.sequences.append(row)
                read += 0 if is_whole else row.ids.numel()
            else:
                if prefix is None:
                    prefix = bos_prefix(tokenizer) if tokenizer is not None else []
                before = len(taken.sequences)
                taken.add_text(row, tokenizer, longest, prefix)
                read += sum(r.ids.numel() for r in taken.sequences[before:])
    return taken
