"""Every Python example in the docs runs."""

import re
from pathlib import Path

import pytest
import torch

import panguq

PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda p: p.stem)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    namespace = {
        "panguq": panguq,
        "torch": torch,
        "model": LlamaForCausalLM(config).eval(),
        "token_ids": torch.randint(0, 64, (4, 32)),
        "folder": tmp_path,
    }
    for example in examples(page):
        exec(compile(example, str(page), "exec"), namespace)
