# ruff: noqa: RUF001  (Chinese text has full-width colons)
"""openPangu on the command line, from the folder as published to a conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import panguq
from panguq.cli import main
from tests.openpangu_folders import CONFIG, SIZES_1B, TEXT, make_openpangu, write_json

pytest.importorskip("sentencepiece")
SHORT = ["--windows", "2", "--window", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_openpangu(tmp_path_factory.mktemp("models") / "pangu", shards=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 4, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def out(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "out"
    arguments = ["--recipe", "w8a8", "--calibration", text, "--out", path, *SHORT]
    assert main(list(map(str, ["compile", folder, *arguments]))) == 0
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "\nhint: " in printed.err
    return printed.err


def test_the_compiled_model_keeps_the_tokenizer_and_its_template(out: Path) -> None:
    loaded: Any = panguq.load(out)
    assert type(loaded.tokenizer).__name__ == "PanguTokenizer"
    assert (out / "tokenizer.model").is_file()
    assert "助手" in loaded.tokenizer.chat_template


def test_eval_of_a_text_and_of_conversations(
    folder: Path, out: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["eval", out, "--against", folder, *SHORT, "--json"]
    assert json.loads(run(capsys, *rest, "--text", text))["windows"] == 2
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text((json.dumps({"messages": chat}) + "\n\n") * 8, encoding="utf-8")
    found = json.loads(run(capsys, *rest, "--text", chats, "--chat"))
    assert found["windows"] == 2
    assert found["float_perplexity"] > 1


def test_conversations_that_eval_cannot_read(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = tmp_path / "chats.jsonl"
    rest = ["eval", out, "--against", folder, "--text", chats, "--chat"]
    for line, message in {
        "plain words": "line 1: not JSON",
        '{"text": "no"}': "line 1 has no list of messages",
        '{"messages": []}': "empty",
        '{"messages": [{"role": "user"}]}': "line 1: message 0 is not a role and a content",
    }.items():
        chats.write_text(line, encoding="utf-8")
        assert f"{chats}: {message}" in refused(capsys, *rest)


def fake_answer(monkeypatch: pytest.MonkeyPatch, answer: str) -> list[str]:
    """Let the model say this, whatever it is asked; what it was asked is in the list."""
    asked: list[str] = []

    def generate(self: Any, input_ids: Any, **_: Any) -> Any:
        asked.append(self.tokenizer.decode(input_ids[0]))
        said = self.tokenizer(answer, add_special_tokens=False).input_ids
        return torch.cat((input_ids, torch.tensor([said])), dim=1)

    monkeypatch.setattr(panguq.CompiledCausalLM, "generate", generate)
    return asked


def test_generate_asks_in_the_chat_format_and_sets_the_thinking_off(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_answer(monkeypatch, "[unused16]Hm, 4.[unused17]It is 4.[unused10]")
    chat = ["generate", out, "--chat", "--prompt", "2+2?"]
    assert run(capsys, *chat) == "(thinking)\nHm, 4.\n(answer)\nIt is 4.\n"
    run(capsys, *chat, "--thinking", "auto", "--system", "Be brief.")
    assert asked == [
        "<s>[unused9]系统：[unused10][unused9]用户：2+2?[unused10][unused9]助手：",
        "<s>[unused9]系统：Be brief.[unused10][unused9]用户：2+2? /auto_think[unused10]"
        "[unused9]助手：",
    ]
    fake_answer(monkeypatch, "It is 4.[unused10]")
    assert run(capsys, *chat, "--thinking", "none") == "It is 4.\n"


def test_thinking_that_was_cut_short_is_said(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_answer(monkeypatch, "[unused16]Hm, let me")
    capsys.readouterr()
    assert main(["generate", str(out), "--chat", "--prompt", "2+2?"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "(thinking)\nHm, let me\n(answer)\n\n"
    assert "did not end within 32 tokens" in printed.err


def test_generate_really_runs(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = ["generate", out, "--chat", "--prompt", "Hi", "--max-new-tokens", "3"]
    assert run(capsys, *chat, "--thinking", "none") == run(capsys, *chat, "--thinking", "none")
    assert "--system and --thinking belong to a chat" in refused(
        capsys, "generate", out, "--prompt", "Hi", "--thinking", "none"
    )


def test_a_dry_run_of_the_1bs_shape_for_ascend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of its 26 layers: the others are the same. Only config.json is there."""
    write_json(tmp_path / "config.json", CONFIG | SIZES_1B | {"num_hidden_layers": 2})
    arguments = ["--dry-run", "--target", "ascend910b1", "--recipe", "w8a8", "--json"]
    found = json.loads(run(capsys, "compile", tmp_path, *arguments))
    assert found["refusals"] == []
    shapes = {(row["n"], row["k"]) for row in found["matmuls"] if not row["gives_logits"]}
    assert shapes == {(1536, 1536), (768, 1536), (6144, 1536), (1536, 6144)}
    assert len(found["matmuls"]) == 2 * 7 + 1
    assert all(row["kernel"] for row in found["matmuls"])
