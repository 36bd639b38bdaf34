"""What people have in memory, as token ids: every form, and what is said of it."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from panguq.data.calibration_data import MOST_TOKENS, CalibrationData, read_calibration
from panguq.errors import InputError
from tests.model_folders import make_tokenizer

IDS = torch.arange(3, 27).reshape(2, 12)
TEXT = "a text of some thirty letters or so"
CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4, I think."}]
SPELLED = "<bos>user: 2+2?\n<bos>assistant: It is 4, I think.\n"
TEMPLATE = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOKENIZER = make_tokenizer()


def chat_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def spelled(data: CalibrationData) -> list[str]:
    return [TOKENIZER.decode(row) for item in data.sequences for row in item.ids]


def lengths(data: CalibrationData) -> list[int]:
    return [len(row) for item in data.sequences for row in item.ids]


class Rows:
    """A map-style data set, such as torch's."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


# --- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        [TEXT, TEXT],
        (text for text in (TEXT, TEXT)),
        [{"text": TEXT, "id": 7}, {"text": TEXT, "id": 8}],
        {"text": [TEXT, TEXT]},
        [{"text": [TEXT, TEXT]}],
        [{"content": TEXT}, {"content": TEXT, "messages": []}],
        [{"from": "a mail", "text": TEXT}, {"role": "a title", "text": TEXT}],
        numpy.array([TEXT, TEXT]),
        Rows([{"text": TEXT}, {"text": TEXT}]),
        DataLoader(Rows([{"text": TEXT}] * 2), batch_size=2),
        DataLoader(Rows([TEXT, TEXT]), batch_size=2),
    ],
    ids=[
        "list", "generator", "rows", "columns", "batches", "content", "mails", "array", "data set",
        "loader of rows", "loader of texts",
    ],
)  # fmt: skip
def test_forms_of_texts(data: Any) -> None:
    read = read_calibration(data, TOKENIZER)
    assert spelled(read) == [TEXT, TEXT]
    assert read.summary.first_80_characters == TEXT
    assert (read.summary.source, read.summary.sequences) == ("given by the caller", 2)


def test_rows_that_hold_nothing_are_skipped_and_counted() -> None:
    read = read_calibration(["", " \n", TEXT, None, float("nan"), []], TOKENIZER)
    assert (spelled(read), read.summary.skipped_empty) == ([TEXT], 5)
    assert str(read.summary) == (
        "given by the caller: 1 sequences, 35 tokens (5 empty rows skipped)"
    )
    rows = [{"input_ids": []}, {"input_ids": IDS}, torch.zeros(2, 0), [[], [5, 6]]]
    read = read_calibration(rows)
    assert (lengths(read), read.summary.skipped_empty) == ([12, 12, 2], 4)


def test_a_long_row_is_cut_into_pieces() -> None:
    read = read_calibration(["x" * 103, TEXT], TOKENIZER, longest=50)
    assert lengths(read) == [50, 50, 35]
    assert (read.summary.cut_rows, read.summary.dropped_tokens) == (1, 3)
    assert "1 long rows cut into pieces; 3 tokens left over" in str(read.summary)


def test_bos_in_the_text_is_not_doubled() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        ids = TOKENIZER(text).input_ids
        return {"input_ids": [[1, *ids] if add_special_tokens else ids]}

    tokenizer.bos_token_id = 1  # type: ignore[attr-defined]
    read = read_calibration([f"<bos>{TEXT}", TEXT, "x" * 60], tokenizer, longest=40)
    assert spelled(read)[:2] == [f"<bos>{TEXT}"] * 2
    assert spelled(read)[2:] == ["<bos>" + "x" * 39, "<bos>" + "x" * 21]


@pytest.mark.parametrize(
    "tokenizer",
    [
        TOKENIZER.backend_tokenizer,
        lambda text, **_: dict(TOKENIZER(text)),
        lambda text, **_: TOKENIZER(text, return_tensors="pt"),
        lambda text, **_: TOKENIZER(text).input_ids,
        lambda text, **_: dict(TOKENIZER(text, padding="max_length", max_length=60)),
    ],
    ids=["tokenizers.Tokenizer", "dict", "tensors", "ids", "padded"],
)
def test_other_tokenizers(tokenizer: Any) -> None:
    assert spelled(read_calibration([TEXT], tokenizer)) == [TEXT]


def test_an_infinite_source_ends_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    read = read_calibration(itertools.repeat([5, 6, 7, 8] * 1000))
    assert MOST_TOKENS <= read.summary.tokens <= MOST_TOKENS + 4000
    assert read.summary.more_left
    assert "the first 66 items are taken, and the rest is left" in caplog.text
    with pytest.raises(InputError, match="empty: no tokens, 65536 empty rows skipped"):
        read_calibration(itertools.repeat(""))


def test_token_ids_in_memory_are_taken_whole() -> None:
    ids = torch.full((3, MOST_TOKENS // 2), 5)
    assert read_calibration(ids).summary.tokens == ids.numel()
    assert read_calibration(list(ids)).summary.tokens == ids.numel()


# --- conversations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        CHAT,
        [CHAT],
        [{"messages": CHAT}],
        {"messages": [CHAT]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", **CHAT[1]}]},
        [{"messages": {"role": ["user", "assistant"], "content": [m["content"] for m in CHAT]}}],
        [[{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, CHAT[1]]],
    ],
    ids=["one", "list", "rows", "columns", "from and value", "struct of columns", "parts"],
)
def test_forms_of_conversations(data: Any) -> None:
    read = read_calibration(data, chat_tokenizer())
    assert spelled(read) == [SPELLED]
    assert read.summary.first_80_characters == SPELLED


def test_conversations_that_cannot_be_read() -> None:
    for data, tokenizer, message in [
        ([CHAT], TOKENIZER, "item 0: the tokenizer has no chat template"),
        ([CHAT], TOKENIZER.backend_tokenizer, "item 0: a Tokenizer has no chat template"),
        ([CHAT], None, "item 0: conversations need a tokenizer"),
        ([CHAT, [{"role": "user"}]], chat_tokenizer(), "item 1: message 0 is not a role"),
        ([{"messages": "[{}]"}], chat_tokenizer(), "item 0: messages is a str, not a list"),
        ([{"messages": ["a", "b"]}], chat_tokenizer(), "item 0, row 0: messages holds no messages"),
    ]:
        with pytest.raises(InputError, match=f"calibration {message}"):
            read_calibration(data, tokenizer)
    broken = chat_tokenizer()
    broken.chat_template = "{{ messages[0].content / 2 }}"
    with pytest.raises(InputError, match="item 0: the model's chat template fails: TypeError"):
        read_calibration([CHAT], broken)


# --- token ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        IDS.numpy().astype("uint16"),
        DataLoader(TensorDataset(IDS), batch_size=2),
        TensorDataset(IDS),
        DataLoader(Rows([{"input_ids": row} for row in IDS]), batch_size=2),
        {"input_ids": IDS.tolist(), "attention_mask": [[1] * 12] * 2},
        [{"input_ids": numpy.array(row)} for row in IDS],
        [tuple(row.tolist()) for row in IDS],
        torch.nested.nested_tensor(list(IDS), layout=torch.jagged),
        [IDS.to(torch.uint16)],
    ],
    ids=[
        "array",
        "loader",
        "tensors",
        "loader of rows",
        "lists",
        "arrays in rows",
        "tuples",
        "nested",
        "uint16",
    ],
)
def test_forms_of_token_ids(data: Any) -> None:
    read = read_calibration(data)
    assert torch.equal(torch.cat([row.ids for row in read.sequences]), IDS)


def test_one_flat_list_is_one_sequence() -> None:
    assert lengths(read_calibration(IDS[0].tolist())) == [12]


def test_ragged_output_of_a_tokenizer() -> None:
    read = read_calibration(TOKENIZER([TEXT, "b b", ""]))
    assert (spelled(read), read.summary.skipped_empty) == ([TEXT, "b b"], 1)


def test_padding_without_a_mask_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    padded = TOKENIZER([TEXT, "short"], padding=True, return_tensors="pt")
    assert lengths(read_calibration(padded, TOKENIZER)) == [35, 5]
    assert "padding" not in caplog.text
    read_calibration(padded["input_ids"], TOKENIZER)
    assert "1 sequences begin or end with padding and no attention_mask" in caplog.text


def test_very_little_data_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert read_calibration([[4, 5]]).summary.tokens == 2
    assert "2 tokens say little" in caplog.text


# --- what is refused ----------------------------------------------------------------------------


def failing() -> Any:
    yield TEXT
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no/such/folder", "no/such/folder: no such file"),
        ("text.jsonl", "text.jsonl: no such file"),
        ("my own words.txt", "my own words.txt: no such file"),
        ("wikitext2", "wikitext2: no such file\n.*Data sets are not fetched"),
        (["a.txt", "b.txt"], "calibration item 0 is 'a.txt', a file's name and no text"),
        (" ", "the calibration data is empty"),
        ("one two", "the text has 7 tokens; 8 are the least that says anything"),
        (b"bytes", "calibration data is a bytes\n.*give a path"),
        ({TEXT}, "calibration data is a set"),
        ({"train": Rows([])}, "has no input_ids, text or messages, but train\n.*split, such as"),
        ([{"instruction": TEXT}], "item 0 has no input_ids, text or messages, but instruction"),
        ([{"text": 3}], "calibration item 0: text is a int, not a text"),
        ([TEXT, {"text": [TEXT, 3]}], "calibration item 1, row 1: text is a int"),
        ([(IDS, IDS)], r"item 0 is a tuple of 2 tensors of shapes \[2, 12\], \[2, 12\]"),
        ((IDS, torch.ones(2, 12)), "calibration item 1 is a tensor of zeros and ones, the mask"),
        ([[5, 2**64]], "calibration item 0 holds numbers that are too large for token ids"),
        ([{"input_ids": "abc"}], "calibration item 0: input_ids are a str"),
        ([{"input_ids": [["a"]]}], "item 0, row 0 is a list of something else than ids"),
        ([{"input_ids": [IDS[0], IDS[1]]}], r"input_ids are 2 tensors of shape \[12\]"),
        (DataLoader(Rows([{"input_ids": [5, 6, 7]}] * 2), batch_size=2),
         r"item 0: the DataLoader made 3 tensors of shape \[2\]"),
        (DataLoader(Rows([IDS[0], IDS[0, :5]]), batch_size=2),
         "calibration item 0 cannot be read: RuntimeError: stack expects"),
        (failing(), "calibration item 1 cannot be read: OSError: the disk is gone"),
        ([TEXT, "half a pair: \ud800"], "item 1: character 13 is half of a surrogate pair"),
    ],
)  # fmt: skip
def test_what_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_calibration(data, TOKENIZER)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (object(), "the tokenizer is a object"),
        (lambda text: [1], "the tokenizer, a function, fails: .* unexpected keyword"),
        (lambda text, **_: {"ids": [1]}, "the tokenizer, a function, gives no token ids"),
    ],
)
def test_tokenizers_that_are_none(tokenizer: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_calibration([TEXT], tokenizer)


def test_a_tokenizer_that_cuts_texts_is_refused() -> None:
    tokenizer = make_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(16)
    with pytest.raises(InputError, match="item 0: the tokenizer cuts texts to 16 tokens"):
        read_calibration([TEXT], tokenizer)


def test_a_sentence_is_a_text_whatever_signs_it_has() -> None:
    for text in ("he and/or she lives by the sea", "他/她在海边的房子里生活和工作"):
        assert spelled(read_calibration(text, TOKENIZER)) == [text]
