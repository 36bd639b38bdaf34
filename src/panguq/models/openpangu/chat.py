"""Chats in a model's own format, with openPangu's thinking switches and its thinking block.

A turn is `[unused9]`, a role in Chinese with a full-width colon, the text, `[unused10]`. An answer
may begin with the model's thinking between `[unused16]` and `[unused17]`. The 7B thinks slowly by
itself; ` /auto_think` at the end of the user's turn lets it decide, ` /no_think` keeps it from
thinking. Whether the 1B obeys these switches is not known. Source: chat_template and generate.py
of openPangu-Embedded-7B-V1.1.
"""

# ruff: noqa: RUF001  (Chinese text has full-width colons)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from panguq.errors import InputError
from panguq.suggest import did_you_mean

Thinking = Literal["slow", "auto", "none"]
Messages = Sequence[Mapping[str, str]]
"""Turns in order: each with a `role` (system, user, assistant …) and its `content`."""

_SWITCHES = {"slow": "", "auto": " /auto_think", "none": " /no_think"}
TURN_START, TURN_END = "[unused9]", "[unused10]"
THINKING_START, THINKING_END = "[unused16]", "[unused17]"
_MARKS = (TURN_START, TURN_END, THINKING_START, THINKING_END)

# For a tokenizer that lost its template: the published format. A chat without a system turn
# starts with an empty one.
CHAT_TEMPLATE = (
    "{%- set names = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具', "
    "'function': '方法'} -%}"
    "{%- if messages and messages[0]['role'] != 'system' -%}{{- '[unused9]系统：[unused10]' -}}"
    "{%- endif -%}"
    "{%- for message in messages if message['role'] in names -%}"
    "{{- '[unused9]' + names[message['role']] + '：' + message['content'] + '[unused10]' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '[unused9]助手：' -}}{%- endif -%}"
)


def is_openpangu(tokenizer: Any) -> bool:
    """Whether a tokenizer has openPangu's turn and thinking marks as tokens of their own."""
    return set(_MARKS) <= set(tokenizer.get_added_vocab())


def chat_prompt(tokenizer: Any, messages: Messages, thinking: Thinking = "slow") -> str:
    """A chat as one text in the model's format, ready for its next answer.

    `thinking` is put at the end of the last turn, which must be the user's. For other models than
    openPangu only "slow" is allowed, and changes nothing. Raises InputError for messages that the
    format cannot carry, and for a tokenizer without a chat template.
    """
    if thinking not in get_args(Thinking):
        raise InputError(
            f"unknown thinking mode {thinking!r}",
            did_you_mean(str(thinking), get_args(Thinking), "modes"),
        )
    _check_messages(tokenizer, messages)
    if messages[-1]["role"] != "user":
        raise InputError(
            f"the last message is the {messages[-1]['role']}'s", "end with a message of the user"
        )
    if thinking != "slow" and not is_openpangu(tokenizer):
        raise InputError(
            f"thinking={thinking!r} is openPangu's; this tokenizer is of another model",
            "leave it out",
        )
    last = {**messages[-1], "content": messages[-1]["content"] + _SWITCHES[thinking]}
    return _apply_template(tokenizer, [*messages[:-1], last], add_generation_prompt=True)


def chat_inputs(tokenizer: Any, messages: Messages, thinking: Thinking = "slow") -> Any:
    """The token ids and attention mask `[1, seq]` of `chat_prompt`, as `generate` takes them.

    openPangu's begin with BOS, as its published example does; other models' templates hold what
    the model wants.
    """
    text = chat_prompt(tokenizer, messages, thinking)
    return tokenizer(text, return_tensors="pt", add_special_tokens=is_openpangu(tokenizer))


def chat_text(tokenizer: Any, messages: Messages) -> str:
    """A whole conversation, answers included, as one text in the model's format.

    Raises InputError as `chat_prompt` does; the last turn may be anyone's.
    """
    _check_messages(tokenizer, messages)
    return _apply_template(tokenizer, messages, add_generation_prompt=False)


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, answer) of openPangu's output, decoded with its special tokens, both stripped.

    Without a thinking block, thinking is "". Where the block has no end, since generation was cut
    short, all of it is thinking and the answer is "". Other models' text is all answer.
    """
    text = text.split(TURN_END, 1)[0]
    before, end, answer = text.partition(THINKING_END)
    head, start, thinking = before.partition(THINKING_START)
    if end and not start:  # the prompt opened the block
        return before.strip(), answer.strip()
    return thinking.strip(), (head + answer).strip()


def _apply_template(tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    template = tokenizer.chat_template
    if not template and is_openpangu(tokenizer):
        template = CHAT_TEMPLATE
    if not template:
        raise InputError("the tokenizer has no chat template", "give a plain prompt, not a chat")
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        raise InputError(
            f"the model's chat template refuses these messages: {error}",
            "many templates want user and assistant in turns",
        ) from error
    return text


def _check_messages(tokenizer: Any, messages: Messages) -> None:
    if not messages:
        raise InputError("there are no messages", "give at least one of the user")
    turn_marks = (TURN_START, TURN_END) if is_openpangu(tokenizer) else ()
    for index, message in enumerate(messages):
        keys = ("role", "content")
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(k), str) for k in keys
        ):
            raise InputError(
                f"message {index} is not a role and a content", 'write {"role": …, "content": …}'
            )
        for mark in turn_marks:
            if mark in message["content"]:
                raise InputError(
                    f"message {index} contains {mark}, which begins or ends a turn",
                    "take it out: it would put words into another's mouth",
                )
