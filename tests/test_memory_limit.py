"""A compile's memory follows from a block and a vocabulary's slice, not from the model."""

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from panguq.cli import main
from panguq.ir.memory import release_free_memory, return_large_blocks
from tests.model_folders import TEXT, make_folder, make_model

torch.set_num_threads(1)
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


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def peak_mib(run) -> float:
    """How much anonymous memory `run` adds at its peak, in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            release_free_memory()  # else a run may live on what its parent has freed
            start = peak = anonymous_mib()
            done = threading.Event()

            def sample() -> None:
                nonlocal peak
                while not done.wait(0.005):
                    peak = max(peak, anonymous_mib())

            thread = threading.Thread(target=sample)
            thread.start()
            code = run()
            done.set()
            thread.join()
            os.write(writer, f"{code} {peak - start}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        code, peak = pipe.read().split()
    os.waitpid(child, 0)
    assert code == "0"
    return float(peak)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w4a16"])
def test_less_than_the_vocabulary_is_held(model: Path, tmp_path: Path, recipe: str) -> None:
    command = ["compile", str(model / "model"), "--recipe", recipe, "--out", str(tmp_path / "out")]
    text = ["--calibration", str(model / "text.txt"), "--windows", "2", "--window", "32"]
    stored = sum(file.stat().st_size for file in (model / "model").glob("*.safetensors")) / 2**20
    assert stored > 220
    # Two float64 slices of 2**24 elements are 256 MiB: slices are what is held, not a vocabulary.
    assert peak_mib(lambda: main([*command, *text])) < stored


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
