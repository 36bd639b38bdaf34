"""What a sentencepiece model says of itself: the few settings that its Python package hides.

The file is a protocol buffer, `ModelProto` of sentencepiece_model.proto: pieces (1), trainer_spec
(2) and normalizer_spec (3). Numbers below are the field numbers and defaults of that file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_TYPE, _NORMAL, _USER_DEFINED = 1, 3, 1, 4
_MODEL_TYPE, _UNIGRAM, _BPE, _SUFFIX, _BYTE_FALLBACK = 3, 1, 2, 24, 35
_CHARACTERS, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE = 2, 3, 4, 5


@dataclass(frozen=True)
class SentencePieceSettings:
    """How a model splits (`is_bpe`), falls back to bytes, and treats text before that.

    `keeps_text`: the text is only prefixed with one space and its spaces are escaped.
    `user_defined`: pieces that are never split, special tokens among them.
    """

    is_bpe: bool
    byte_fallback: bool
    keeps_text: bool
    user_defined: frozenset[str]


def read_settings(data: bytes) -> SentencePieceSettings:
    """The settings of a tokenizer.model. Raises ValueError for what is no protocol buffer."""
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    user_defined = set()
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == _PIECES:
            piece = dict(_fields(value))
            text = piece.get(_PIECE_TEXT, b"")
            if piece.get(_PIECE_TYPE, _NORMAL) == _USER_DEFINED and isinstance(text, bytes):
                user_defined.add(text.decode("utf-8"))
        elif number == _TRAINER:
            trainer = dict(_fields(value))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(value))
    return SentencePieceSettings(
        is_bpe=trainer.get(_MODEL_TYPE, _UNIGRAM) == _BPE,
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, False)),
        keeps_text=(
            not normalizer.get(_CHARACTERS)
            and bool(normalizer.get(_DUMMY_PREFIX, True))
            and not normalizer.get(_REMOVE_SPACES, True)
            and bool(normalizer.get(_ESCAPE, True))
            and not trainer.get(_SUFFIX, False)
        ),
        user_defined=frozenset(user_defined),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values: numbers for varints, bytes for all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError("ends in the middle of a field")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("ends in the middle of a number")
