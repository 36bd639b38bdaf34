"""A compile's memory follows from a block and a vocabulary's slice, not from the model."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from panguq.tensors.memory import return_large_blocks
from tests.model_folders import TEXT, make_folder, make_model
from tests.peak_memory import peak_mib, peaks_of_commands

VOCABULARY, HIDDEN, LAYERS = 90_000, 640, 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """230 MiB of bfloat16 weights for embedding and logits, and little else."""
    place = tmp_path_factory.mktemp("large")
    sizes = dict(hidden_size=HIDDEN, intermediate_size=1024, num_hidden_layers=LAYERS)
    make_folder(place / "model", make_model(**sizes).bfloat16())
    file = place / "model" / "model.safetensors"
    weights = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.randn(VOCABULARY // 64, HIDDEN).bfloat16().repeat(64, 1)
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((place / "model" / "config.json").read_text())
    rows = weights["lm_head.weight"].shape[0]
    config |= {"vocab_size": rows, "tie_word_embeddings": False}
    (place / "model" / "config.json").write_text(json.dumps(config))
    (place / "text.txt").write_text(TEXT)
    return place


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_less_than_the_vocabulary_is_held(model: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "small", make_model().bfloat16())

    def command(folder: Path, recipe: str, out: str) -> list[str]:
        text = ["--calibration", str(model / "text.txt"), "--windows", "2", "--window", "32"]
        return ["compile", str(folder), "--recipe", recipe, "--out", str(tmp_path / out), *text]

    stored = sum(file.stat().st_size for file in (model / "model").glob("*.safetensors")) / 2**20
    assert stored > 220
    # Two float64 slices of 2**24 elements are 256 MiB: slices are what is held, not a vocabulary.
    recipes = ["w8a8-dynamic", "w4a16"]
    commands = [command(model / "model", recipe, recipe) for recipe in recipes]
    first = command(tmp_path / "small", "w4a16", "small-out")
    peaks = dict(zip(recipes, peaks_of_commands(commands, after=first), strict=True))
    assert max(peaks.values()) < stored, peaks


def test_the_sampler_sees_an_allocation() -> None:
    """Also where this process has freed blocks that an allocation could live on."""
    return_large_blocks()
    *freed, last = [torch.ones(1 << 18) for _ in range(200)]
    del freed

    def hold() -> int:
        held = torch.ones(100 << 18)
        time.sleep(0.5)  # a shorter life may fall between two samples
        return int(held[0]) - int(last[0])

    assert peak_mib(hold) > 90
