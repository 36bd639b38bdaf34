# ruff: noqa: RUF001  (Chinese text has full-width colons)
"""openPangu's tokenizer, built from tokenizer.model without its code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sentencepiece")

from panguq.data.calibration import bos_prefix, token_windows
from panguq.errors import InputError, PanguqError, StorageError
from panguq.models.hf import load_tokenizer
from panguq.models.tokenizer_files import tokenizer_files
from tests.openpangu_folders import (
    CONFIG,
    MARKS,
    SPECIAL,
    TEXT,
    make_openpangu,
    sentencepiece_model,
    tokenizer_settings,
    write_json,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_openpangu(tmp_path_factory.mktemp("models") / "pangu")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def fast(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers makes of the files that are saved, in a folder without anything else."""
    folder = tmp_path_factory.mktemp("saved")
    write_files(folder, tokenizer_files(tokenizer))
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def write_files(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def by_sentencepiece(text: str) -> list[int]:
    """Tokens as the published class finds them: special tokens first, sentencepiece between."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ids, segment = [], ""
    while text:
        mark = next((mark for mark in SPECIAL if text.startswith(mark)), None)
        if mark is not None:
            ids += [*pieces.encode(segment), SPECIAL.index(mark)]
            segment, text = "", text[len(mark) :]
        else:
            segment, text = segment + text[0], text[1:]
    return ids + pieces.encode(segment)


TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*SPECIAL, " ", "  ", "\n", "\t", "▁", "系统：", "the", "12", "[unused"]),
        st.text(max_size=6),
        st.sampled_from(TEXT.split(" ")),
    ),
    max_size=8,
).map("".join)


@given(TEXTS)
def test_tokens_are_sentencepieces_between_special_tokens(tokenizer: Any, text: str) -> None:
    assert tokenizer(text).input_ids == [1, *by_sentencepiece(text)]


@given(TEXTS)
def test_the_saved_files_give_other_loaders_the_same_tokens(
    tokenizer: Any, fast: Any, text: str
) -> None:
    assert fast.is_fast
    assert fast(text).input_ids == tokenizer(text).input_ids


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁\0")))
def test_decoding_gives_the_text_back(tokenizer: Any, text: str) -> None:
    if any(mark in text for mark in SPECIAL):
        return
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([12, *ids, 13]) == f"[unused9]{text}[unused10]"


def test_special_tokens_are_those_of_the_settings(tokenizer: Any) -> None:
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == CONFIG["eos_token_id"]
    assert tokenizer.pad_token == tokenizer.unk_token == "<unk>"
    assert tokenizer.convert_tokens_to_ids(MARKS) == list(range(3, 37))
    assert tokenizer.decode(tokenizer("a b").input_ids, skip_special_tokens=True) == "a b"
    assert bos_prefix(tokenizer) == [1]
    assert token_windows(TEXT * 3, tokenizer, 16, 2)[:, 0].tolist() == [1, 1]


def test_ids_that_only_pad_the_embedding_are_no_text(tokenizer: Any) -> None:
    ids = tokenizer("a b", add_special_tokens=False).input_ids
    assert CONFIG["vocab_size"] > tokenizer.vocab_size
    assert tokenizer.decode([*ids, CONFIG["vocab_size"] - 1]) == "a b"


def test_settings_without_special_tokens_take_them_from_the_map(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    settings = tokenizer_settings()
    del settings["eos_token"]
    write_json(tmp_path / "tokenizer_config.json", settings)
    assert load_tokenizer(tmp_path).eos_token == "[unused10]"


def test_bos_is_left_out_where_the_settings_say_so(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", tokenizer_settings() | {"add_bos_token": False})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a").input_ids == by_sentencepiece("a")
    (tmp_path / "saved").mkdir()
    write_files(tmp_path / "saved", tokenizer_files(tokenizer))
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert fast("a").input_ids == by_sentencepiece("a")


def test_saving_and_loading_changes_nothing(tokenizer: Any, tmp_path: Path) -> None:
    files = tokenizer_files(tokenizer)
    assert files["tokenizer.model"] == sentencepiece_model()
    assert not any(name.endswith(".py") for name in files)
    assert "auto_map" not in json.loads(files["tokenizer_config.json"])
    write_files(tmp_path, files)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert tokenizer_files(again) == files
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 420},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": (*MARKS, "model")},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_vocabulary_without_an_equal_fast_form_is_saved_without_one(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody must get other tokens than sentencepiece's."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, **options))
    files = tokenizer_files(tokenizer)
    assert "tokenizer.json" not in files
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "PanguTokenizer"
    assert "has no equal tokenizer.json" in caplog.text


def test_settings_that_name_a_piece_otherwise_win_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tokenizer(tmp_path, user_defined_symbols=("[x]", *MARKS[1:]))
    tokenizer = load_tokenizer(tmp_path)
    assert "calls token 3 [x], and tokenizer_config.json calls it [unused0]" in caplog.text
    assert tokenizer("a[unused0]", add_special_tokens=False).input_ids[-1] == 3
    assert tokenizer.decode([3]) == "[unused0]"


# --- what cannot be built -----------------------------------------------------------------------


def refused(kind: type[PanguqError], folder: Path) -> str:
    with pytest.raises(kind) as caught:
        load_tokenizer(folder)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_truncated_vocabulary(tmp_path: Path, size: int) -> None:
    write_tokenizer(tmp_path)
    data = sentencepiece_model()
    (tmp_path / "tokenizer.model").write_bytes(data[:size])
    assert "tokenizer.model: truncated or damaged" in refused(StorageError, tmp_path)


def test_a_vocabulary_that_is_a_git_lfs_pointer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / "tokenizer.model").write_text(pointer)
    assert "a Git LFS pointer" in refused(StorageError, tmp_path)


def test_a_special_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    """As with a tokenizer.model that was cut between two of its pieces."""
    write_tokenizer(tmp_path)
    settings = tokenizer_settings()
    tokens = settings["added_tokens_decoder"]
    tokens["45892"] = tokens.pop("13")
    write_json(tmp_path / "tokenizer_config.json", settings)
    assert "[unused10] is token 45892, of" in refused(StorageError, tmp_path)


def test_a_vocabulary_larger_than_the_models(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", CONFIG | {"vocab_size": 300})
    message = refused(StorageError, tmp_path)
    assert "pieces, but the model's vocab_size is 300" in message


def test_a_special_token_that_no_piece_is(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", tokenizer_settings() | {"eos_token": "<end>"})
    assert "eos_token is <end>, which tokenizer.model does not have" in refused(
        StorageError, tmp_path
    )


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_settings(tmp_path: Path, text: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert "tokenizer" in refused(PanguqError, tmp_path)


def test_no_vocabulary(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    assert "no tokenizer that can be loaded" in refused(InputError, tmp_path)


def test_without_the_package_sentencepiece(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The original folder names what is missing; what panguq saved loads all the same."""
    write_files(tmp_path, tokenizer_files(tokenizer))
    code = f"""
import sys
sys.modules["sentencepiece"] = None  # an import fails
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: name != "sentencepiece" and find(name, *rest) or None
from panguq.errors import InputError
from panguq.models.hf import load_tokenizer
try:
    load_tokenizer({str(folder)!r})
except InputError as error:
    print(error.message)
    print(error.hint)
print(load_tokenizer({str(tmp_path)!r})("ab").input_ids)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, hint, ids = done.stdout.splitlines()
    assert "needs the package sentencepiece" in message
    assert hint == "pip install 'panguq[openpangu]'"
    assert json.loads(ids) == tokenizer("ab").input_ids
