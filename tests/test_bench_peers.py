"""What is panguq's own in the comparison with other quantizers; no peer runs here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.peers import __main__ as command
from bench.peers.environments import GPTQMODEL
from bench.peers.inputs import number_tokenizer, random_tokens
from bench.peers.job import FIGURES, WEIGHTS, Job, Measurement
from bench.peers.quality import load_dequantized, per_token_int8, round_inputs
from bench.peers.quantize_panguq import recipe_of
from bench.peers.rows import GROUP_SIZES, METHODS, rows
from bench.peers.table import tables
from tests.model_shelf import VOCAB, make_model

FIGURES_OF_A_ROW = {
    "perplexity": 22.0, "float_perplexity": 20.0, "kl": 0.1, "top1": 0.8, "quantize_seconds": 60.0,
    "quantize_cpu_seconds": 100.0, "process_seconds": 70.0, "peak_resident_mib": 900.0,
    "peak_anonymous_mib": 500.0, "versions": {"torch": "2"},
}  # fmt: skip


def job(folder: Path) -> Job:
    return Job(model="m", tokens="t", method="gptq", group_size=64, threads=1, out=str(folder))


def test_rounding_inputs_gives_each_token_its_own_scale() -> None:
    # Scales 1, 0.01 and none; 127.5 steps make the largest value, which clamps to code 127.
    x = torch.tensor([[127.5, -3.4, 0.6], [1.275, 0.014, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, -3.0, 1.0], [1.27, 0.01, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(per_token_int8(x), expected)


def test_every_linear_but_the_logits_rounds_its_input() -> None:
    ids = torch.randint(3, VOCAB, (1, 16), generator=torch.Generator().manual_seed(0))
    model, plain = make_model("llama"), make_model("llama")
    round_inputs(model)
    rounded = [n for n, m in model.named_modules() if type(m).__name__ == "RoundedInput"]
    assert len(rounded) == 14
    assert not any("lm_head" in name for name in rounded)
    with torch.no_grad():
        difference = (model(ids).logits - plain(ids).logits).abs().max()
    assert 0 < difference < 1


def test_dequantized_weights_must_be_all_and_known() -> None:
    model, other = make_model("llama"), make_model("llama", seed=1)
    weights = {n: p.detach().clone() for n, p in other.named_parameters()}
    load_dequantized(model, weights)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    left_out = {n: t for n, t in weights.items() if "norm" not in n}
    with pytest.raises(KeyError, match=r"missing \['model.layers.0.input_layernorm"):
        load_dequantized(model, left_out)
    with pytest.raises(KeyError, match=r"unknown weights \['strange"):
        load_dequantized(model, {**weights, "strange.weight": torch.zeros(1)})


def test_a_measurement_counts_quantizing_only(tmp_path: Path) -> None:
    measurement = Measurement(job(tmp_path / "out"), ())
    measurement.load(lambda: None)
    result = measurement.quantize(lambda: 5, {"bits": 4})
    measurement.write({"a.weight": torch.ones(2, 3, dtype=torch.bfloat16).T})
    figures = json.loads((tmp_path / "out" / FIGURES).read_text())
    assert result == 5
    assert figures["options"] == {"bits": 4}
    assert figures["process_seconds"] >= figures["quantize_seconds"] >= 0
    stored = load_file(tmp_path / "out" / WEIGHTS)["a.weight"]
    assert stored.dtype == torch.float32
    assert stored.shape == (3, 2)


def test_rows_can_be_chosen_and_all_have_a_group_size_and_a_title() -> None:
    every = list(rows())
    assert len({row.name for row in every}) == len(every)
    assert {row.model for row in every} == set(GROUP_SIZES)
    assert {row.method for row in every} == set(METHODS)
    chosen = rows(models=["smollm2"], methods=["gptq"], peers=["GPTQModel"])
    assert [row.name for row in chosen] == ["smollm2/gptq/GPTQModel"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_recipe_with_the_groups_of_the_row(method: str) -> None:
    recipe = recipe_of(method, 64)
    (scheme,) = recipe.schemes.values()
    bits = {"w8a8": "W8A8", "w8a8-dynamic": "W8A8_DYNAMIC", "awq-asym": "W4A16_ASYM-g64"}
    assert scheme == bits.get(method, "W4A16-g64")


def test_a_failing_peer_makes_a_row_that_says_why(tmp_path: Path) -> None:
    row = next(rows(peers=[GPTQMODEL.name]))
    error = command.run_job(row, job(tmp_path), Path("/bin/false"))
    assert error is not None
    assert "exit code 1" in error


def test_the_tables_say_what_failed_and_compare_like_with_like() -> None:
    text = tables(
        {
            "smollm2/awq/panguq": FIGURES_OF_A_ROW,
            "smollm2/gptq/GPTQModel": FIGURES_OF_A_ROW,
            "random/gptq/panguq": FIGURES_OF_A_ROW,
            "random/awq/panguq": {"error": "killed"},
        }
    )
    assert text.index("GPTQ W4A16 | GPTQModel | 22.000 | +10.00 %") < text.index("AWQ W4A16")
    assert "| scheme | by | KL | quantize |" in text  # the random model has no other quality
    assert "- `random/awq/panguq` failed: killed" in text


def test_random_tokens_repeat_and_the_tokenizer_knows_all_of_them() -> None:
    first, second = random_tokens(2, vocabulary=50), random_tokens(2, vocabulary=50)
    assert torch.equal(first["calibration"], second["calibration"])
    assert first["calibration"].shape == (16, 512)
    assert not torch.equal(first["calibration"][:2], first["evaluation"])
    assert number_tokenizer(50)("7 49")["input_ids"] == [7, 49]


def test_the_command_line_takes_rows_by_name() -> None:
    options = command.parse(["--models", "random", "--methods", "awq"])
    assert (options.models, options.methods, options.windows) == (["random"], ["awq"], 16)
