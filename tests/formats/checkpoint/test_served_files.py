"""What lies beside the weights of a checkpoint for a server: it is true, with a tokenizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import panguq
from panguq.formats.checkpoint.served_files import served_config
from tests.model_folders import make_folder, make_model, make_tokenizer

FORMATS = ["compressed-tensors", "ascend"]


def small(**changed: Any) -> Any:
    return make_model(num_hidden_layers=1, **changed).to(torch.bfloat16)


def compiled(model: Any, tokenizer: Any = None) -> Any:
    return panguq.compile(model, "w8a8-dynamic-serving", tokenizer=tokenizer)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("models") / "llama", small())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 7}')
    return folder


@pytest.fixture(scope="module")
def from_folder(source: Path) -> Any:
    return compiled(panguq.load_pretrained(source))


@pytest.mark.parametrize("format", FORMATS)
def test_the_tokenizer_of_the_models_folder_is_there(
    format: str, from_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from_folder.save(tmp_path / "out", format=format)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("a text").input_ids) == "a text"
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello!"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["top_k"] == 7
    assert "NO TOKENIZER" not in said(caplog)


def test_a_tokenizer_that_is_given_wins(source: Path) -> None:
    mine = make_tokenizer()
    model = panguq.load_pretrained(source)
    assert panguq.compile(model, "float", tokenizer=mine).tokenizer is mine


def test_transformers_own_loading_names_the_folder_too(source: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    found = panguq.compile(model, "float").tokenizer
    assert found.chat_template == "{{ messages[0].content }}!"


def test_the_folders_tokenizer_does_not_serve_a_resized_vocabulary(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = panguq.load_pretrained(source)
    model.resize_token_embeddings(300)
    assert panguq.compile(model, "float").tokenizer is None
    assert "resized" in said(caplog)


def test_config_json_says_what_the_folder_holds_and_a_missing_tokenizer_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small()
    model.resize_token_embeddings(272)
    model.config.update({
        "vocab_size": 264, "num_nextn_predict_layers": 1, "quantization_config": None,
        "vision_config": {"depth": 2}, "auto_map": {"AutoModel": "m.M"}, "dtype": "float32",
        "tie_word_embeddings": True,
    })  # fmt: skip
    made = compiled(model)
    assert made.tokenizer is None
    for format in FORMATS:
        caplog.clear()
        made.save(tmp_path / format, format=format)
        assert "NO TOKENIZER" in said(caplog)
        data = json.loads((tmp_path / format / "config.json").read_text())
        assert (data["vocab_size"], data["tie_word_embeddings"]) == (272, False)
        assert data["dtype"] == data["torch_dtype"] == "bfloat16"
        assert not data.get("num_nextn_predict_layers")
        assert not {"vision_config", "auto_map", "_name_or_path"} & data.keys()
        quantized = data.get("quantization_config") is not None
        assert quantized is (format == "compressed-tensors")


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new {i}>" for i in range(9)])
    compiled(small(), tokenizer=tokenizer).save(tmp_path / "out", format="ascend")
    assert "has 268 tokens and the model's embedding 264 rows" in said(caplog)


def test_layers_that_predict_further_tokens_are_not_promised(tmp_path: Path) -> None:
    from panguq.formats.checkpoint.served_files import config_of

    model = panguq.compile(small(), "float")
    model.config = transformers.Glm4MoeConfig(num_nextn_predict_layers=1)
    assert config_of(model, is_tied=False)["num_nextn_predict_layers"] == 0


def test_a_stale_architecture_is_replaced() -> None:
    config = transformers.Gemma3TextConfig(architectures=["Gemma3ForConditionalGeneration"])
    assert served_config(config, torch.bfloat16)["architectures"] == ["Gemma3ForCausalLM"]
