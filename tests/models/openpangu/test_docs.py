"""The commands and examples of docs/openpangu.md run, in order, on a small folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import panguq
from panguq.cli import main
from tests.openpangu_folders import CONFIG, TEXT, make_openpangu, make_weights

pytest.importorskip("sentencepiece")
PAGE = Path(__file__).parents[3] / "docs" / "openpangu.md"
SIZES = dict(
    hidden_size=128, intermediate_size=256, max_position_embeddings=1024, torch_dtype="bfloat16"
)  # fmt: skip


def blocks(page: str) -> list[tuple[str, str]]:
    """Shell and Python blocks in order; blocks without a language need a network."""
    return re.findall(r"```(sh|py|python)\n(.*?)```", page, re.DOTALL)


def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = make_weights(CONFIG | SIZES)
    half = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    make_openpangu(tmp_path / "openpangu-7b", shards=4, weights=half, **SIZES)
    (tmp_path / "text.txt").write_text(TEXT * 10, encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(TEXT * 10, encoding="utf-8")
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": TEXT}]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 9, encoding="utf-8")
    namespace = {"panguq": panguq}
    commands = 0
    for language, text in blocks(PAGE.read_text(encoding="utf-8")):
        if language != "sh":
            exec(compile(text, str(PAGE), "exec"), namespace)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "panguq"
            assert main(arguments) == 0, capsys.readouterr().err
            commands += 1
    assert commands == 9
    assert (tmp_path / "openpangu-7b-ascend" / "quant_model_description.json").is_file()
