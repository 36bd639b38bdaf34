"""Every Python example in the docs runs."""

import itertools
import re
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import panguq
from panguq import registry
from panguq.formats.registry import FORMATS
from panguq.ir.analysis.channel_rules import RULES
from panguq.ir.number_format import FORMATS as NUMBER_FORMATS
from panguq.ir.quant_spec import SCHEMES
from panguq.kernels.ascend.chips import CHIPS
from panguq.lowering.targets import TARGETS

CHANGED_BY_PAGES = (FORMATS, RULES, NUMBER_FORMATS, SCHEMES, TARGETS, CHIPS)

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def examples(page: Path) -> list[tuple[str, str | None]]:
    """The page's Python blocks, each with what it prints: the `text` block behind it, if any."""
    blocks = [*BLOCK.findall(page.read_text(encoding="utf-8")), ("", "")]
    return [
        (text, then if following == "text" else None)
        for (kind, text), (following, then) in itertools.pairwise(blocks)
        if kind == "python"
    ]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if examples(p)], ids=lambda p: str(p.relative_to(DOCS))
)
def test_examples_run(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    with ExitStack() as restored:
        for known in CHANGED_BY_PAGES:
            restored.enter_context(patch.dict(known))
        restored.enter_context(patch.object(registry, "RECIPE_PASSES", registry.RECIPE_PASSES))
        for example, said in examples(page):
            capsys.readouterr()
            exec(compile(example, str(page), "exec"), namespace)
            if said is not None:
                assert capsys.readouterr().out.strip() == said.strip()


def test_files_that_contributors_are_sent_to_exist() -> None:
    """Paths in backticks, such as `passes/pipeline/base.py`; what has a `<` in it is a pattern."""
    guides = [*(DOCS / "contributing").glob("*.md"), ROOT / "CONTRIBUTING.md"]
    named = {
        (guide.name, path)
        for guide in guides
        for path in re.findall(r"`([\w./-]+/[\w./-]*)`", guide.read_text(encoding="utf-8"))
    }
    assert ("write-a-pass.md", "ir/edit.py") in named
    assert {(page, path) for page, path in named if not (ROOT / path).exists()} == set()
