"""Texts and conversations to token ids, and token ids to pieces of a length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from panguq.errors import InputError, PanguqError

SHORTEST = 8
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def encode_text(tokenizer: Any, text: str, special: bool, where: str = "the text") -> list[int]:
    """The token ids of a text, with the tokenizer's special tokens or without.

    `tokenizer` is transformers', a `tokenizers.Tokenizer`, or anything that is called like
    transformers' and returns a mapping with `input_ids`. A text that begins with the text of BOS
    does not get a second one. Raises InputError, naming `where`, for a text that is not Unicode and
    for a tokenizer that is none of these.
    """
    _check_unicode(text, where)
    if tokenizer is None:
        raise InputError(f"{where}: calibration texts need a tokenizer", "pass tokenizer=")
    call = tokenizer if callable(tokenizer) else getattr(tokenizer, "encode", None)
    if call is None:
        raise InputError(f"the tokenizer is a {type(tokenizer).__name__}", _TOKENIZERS)
    try:
        encoded = call(text, add_special_tokens=special)
    except Exception as error:  # whatever a tokenizer of somebody's raises
        raise InputError(
            f"{where}: the tokenizer, a {type(tokenizer).__name__}, fails: {error}", _TOKENIZERS
        ) from error
    ids = _ids_of(encoded, tokenizer, where)
    bos = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if special and bos is not None and ids[:2] == [bos, bos] else ids


_TOKENIZERS = "give a tokenizer of transformers (panguq.load_tokenizer) or a tokenizers.Tokenizer"


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is half of a surrogate pair, which is not text",
            'replace it: text.encode("utf-8", "replace").decode()',
        ) from None


def _ids_of(encoded: Any, tokenizer: Any, where: str) -> list[int]:
    if isinstance(encoded, Mapping):
        ids, mask = encoded.get("input_ids"), encoded.get("attention_mask")
    else:  # an Encoding of the package tokenizers, or the ids themselves
        ids, mask = getattr(encoded, "ids", encoded), getattr(encoded, "attention_mask", None)
        if getattr(encoded, "overflowing", None):
            raise InputError(
                f"{where}: the tokenizer cuts texts to {len(ids)} tokens",
                "call tokenizer.no_truncation()",
            )
    flat, real = _flat(ids), _flat(mask)
    if flat is None or (real is not None and len(real) != len(flat)):
        raise InputError(
            f"{where}: the tokenizer, a {type(tokenizer).__name__}, gives no token ids", _TOKENIZERS
        )
    return flat if real is None else [i for i, keep in zip(flat, real, strict=True) if keep]


def _flat(ids: Any) -> list[int] | None:
    """A sequence of integers out of a tensor, an array or a list, alone or in a batch of one."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, Sequence) and len(ids) == 1 and isinstance(ids[0], Sequence):
        ids = ids[0]
    if not isinstance(ids, Sequence) or not all(isinstance(i, Integral) for i in ids):
        return None
    return [int(i) for i in ids]


def bos_prefix(tokenizer: Any) -> list[int]:
    """What this tokenizer puts before every text: [BOS] if that is its habit, else []."""
    text, whole = (encode_text(tokenizer, "a", special) for special in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
    return whole[: starts[0]] if text and starts else []


def pieces(
    ids: list[int], length: int, prefix: list[int], count: int | None = None
) -> tuple[list[list[int]], int, bool]:
    """Token ids in pieces of at most `length` tokens that do not overlap, `count` at most.

    Each begins with `prefix`, which counts. Also returned: how many tokens are in no piece because
    the last one would have been shorter than 8 tokens, and whether more than `count` were there.
    """
    while prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    body = length - len(prefix)
    cut = [ids[start : start + body] for start in range(0, len(ids), body)]
    more = count is not None and len(cut) > count
    cut = cut[:count]
    dropped = 0
    if len(cut) > 1 and len(prefix) + len(cut[-1]) < SHORTEST:
        dropped = len(cut.pop())
    return [[*prefix, *piece] for piece in cut], dropped, more


def token_windows(text: str, tokenizer: Any, window: int, windows: int) -> Tensor:
    """The first `windows` non-overlapping windows of a text's tokens, `[windows, window]`.

    A tokenizer that puts BOS first does so in every window. What is left behind the last whole
    window is not taken; a text shorter than one window is one shorter window. Raises InputError if
    the text has fewer than 8 tokens.
    """
    check_windows(window, windows)
    ids = encode_text(tokenizer, text[: most_characters(window, windows)], special=False)
    if len(ids) < SHORTEST:
        raise too_short(len(ids))
    rows, _, _ = pieces(ids, window, bos_prefix(tokenizer), windows)
    whole = [row for row in rows if len(row) == window]
    return torch.tensor(whole or rows)


def check_windows(window: int, windows: int) -> None:
    """Raises InputError for windows that say nothing."""
    if window < SHORTEST or windows < 1:
        raise InputError(
            f"{windows} windows of {window} tokens say nothing",
            f"take at least one window of at least {SHORTEST} tokens",
        )


def most_characters(window: int, windows: int) -> int:
    """More characters than these windows hold of any text, and a bound on the work."""
    return window * windows * 12


def too_short(tokens: int, where: str = "") -> InputError:
    """The error for a text of so few tokens."""
    return InputError(
        f"{where}: the text has".removeprefix(": ")
        + f" {tokens} tokens; {SHORTEST} are the least that says anything",
        "give a longer text",
    )


def conversation_text(tokenizer: Any, messages: Sequence[Any], where: str) -> str:
    """A conversation in the tokenizer's chat format.

    A message is `{"role", "content"}` or `{"from", "value"}`; its content is a text or a list of
    parts of type `text`. Raises InputError, naming `where`, for any other, and for a tokenizer
    without a chat template.
    """
    from panguq.models.openpangu.chat import chat_text

    if tokenizer is None:
        raise InputError(f"{where}: conversations need a tokenizer", "pass tokenizer=")
    if not hasattr(tokenizer, "apply_chat_template"):
        raise InputError(
            f"{where}: a {type(tokenizer).__name__} has no chat template",
            "give a tokenizer of transformers, or the conversations as texts",
        )
    try:
        return chat_text(tokenizer, [_message(message) for message in messages])
    except PanguqError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from error
    except Exception as error:  # a template is a program of the model's
        raise InputError(
            f"{where}: the model's chat template fails: {type(error).__name__}: {error}",
            "write the conversations as texts yourself",
        ) from error


def is_message(value: Any) -> bool:
    """Whether this is one turn of a conversation."""
    if not isinstance(value, Mapping):
        return False
    return ("role" in value and "text" not in value) or ("from" in value and "value" in value)


def _message(message: Any) -> Mapping[str, Any]:
    """A message with `role` and `content`; what has none comes back as it is, to be refused."""
    if not isinstance(message, Mapping):
        return message
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _is_text_part(part: Any) -> bool:
    text = part.get("text") if isinstance(part, Mapping) else None
    return isinstance(text, str) and part.get("type", "text") == "text"


def follows_bos(tokenizer: Any) -> bool:
    """Whether a text in the chat format still needs the tokenizer's special tokens: openPangu's."""
    from panguq.models.openpangu.chat import is_openpangu

    return is_openpangu(tokenizer)
