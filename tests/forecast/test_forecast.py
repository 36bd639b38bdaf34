"""What a request takes on a server: the host's part, the device's, and what the card holds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from panguq.cli import main
from panguq.errors import InputError, PanguqError
from panguq.forecast.forecast import Forecast, Request, forecast
from panguq.forecast.graph import graph_of
from panguq.forecast.launch_paths import LAUNCH_PATHS, find_launch_path
from panguq.forecast.parallel import Cards
from panguq.forecast.text import render, verdict
from panguq.lowering.targets import find_target
from tests.config_folders import MIXTURE, PANGU, config_folder

ONE_B = PANGU | {
    "vocab_size": 153376,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 26,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 128,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return graph_of(config_folder(tmp_path_factory.mktemp("small"), PANGU), "W8A8", "bfloat16")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    path = config_folder(tmp_path_factory.mktemp("mixture"), MIXTURE)
    return graph_of(path, "W8A8_DYNAMIC", "bfloat16")


USUAL = Request(1, 128, 16)


def found(graph, request=USUAL, mode="graph", **options) -> Forecast:
    path = options.pop("path", None) or find_launch_path("vllm-ascend", mode)
    target = find_target("ascend910b2")
    return forecast(*graph, target, path, request, scheme="W8A8", **options)


def test_a_step_is_the_longer_of_host_and_device(small) -> None:
    result = found(small)
    decode = result.float_times.decode
    assert decode.bound_by == "host" and decode.ms == decode.host_ms == pytest.approx(2 * 0.462)
    fast_host = replace(find_launch_path("vllm-ascend"), layer_us=1.0, quantize_us=0.1)
    device = found(small, path=fast_host).times.decode
    assert device.bound_by == "device" and device.ms == device.device_ms > device.host_ms


def test_a_request_is_its_prompt_and_the_other_tokens(small) -> None:
    times = found(small).times
    assert times.request_s == pytest.approx((times.prefill.ms + 15 * times.decode.ms) / 1000)
    one = found(small, Request(1, 128, 1)).times
    assert one.request_s == pytest.approx(one.prefill.ms / 1000)


def test_what_the_host_does(small) -> None:
    eager, graph = (found(small, mode=mode).float_times.decode for mode in ("eager", "graph"))
    assert eager.host_ms == pytest.approx(2 * 1.147) and eager.host_ms > graph.host_ms
    four = found(small, Request(4, 128, 16)).float_times.decode
    assert four.host_ms - graph.host_ms == pytest.approx(1.451 + 3 * 0.087)
    # q, k and v read one value, o, gate and up, and down one each: 4 kernels that quantize a layer
    assert found(small).times.decode.host["quantizers"] == pytest.approx(2 * 4 * 0.0101)


def test_the_device_takes_longer_for_more(small) -> None:
    base = found(small).times
    assert found(small, Request(1, 4096, 16)).times.prefill.device_ms > base.prefill.device_ms
    assert found(small, Request(8, 4096, 16)).times.decode.device_ms > base.decode.device_ms


def test_memory_of_a_card(small) -> None:
    result = found(small, Request(2, 100, 28), card_bytes=2**30)
    per_token = 2 * 2 * 4 * 64 * 2  # layers, key and value, heads, head size, bytes
    assert result.memory.cache_per_token == per_token
    assert result.memory.cache(2, 128) == 2 * 128 * per_token
    assert result.float_memory.weights > result.memory.weights
    memory = result.memory
    most = memory.largest_batch(128)
    assert most is not None and memory.usable is not None
    assert memory.needed(most, 128) <= memory.usable < memory.needed(most + 1, 128)
    assert found(small, card_bytes=2**20).fits is False
    assert "does not fit" in verdict(found(small, card_bytes=2**20))


def test_the_logs_loss_is_predicted(tmp_path) -> None:
    """openPangu-Embedded-1B, W8A8, 4096 + 32 tokens: 0.91 and 0.95 of bfloat16's speed."""
    graph = graph_of(config_folder(tmp_path, ONE_B), "W8A8", "bfloat16")
    result = found(graph, Request(1, 4096, 32))
    assert result.gain < 0.97
    assert result.float_times.request_s == pytest.approx(0.4234, rel=0.1)  # the mean of two runs
    assert result.times.request_s == pytest.approx(0.4553, rel=0.1)
    assert verdict(result) == (
        "do not quantize this for speed: the host is the limit; W8A8 saves 0.9 GiB and makes a "
        f"request take {1 / result.gain - 1:.0%} longer"
    )


def test_verdicts(small) -> None:
    result = found(small)
    plain = result.float_times
    for gain, said in ((1.0, "and no time"), (0.8, "25% longer"), (1.25, "takes 20% less time")):
        slower = replace(plain.decode, host={"layers": plain.decode.host_ms / gain})
        times = replace(plain, prefill=replace(plain.prefill, host={"layers": 0.0}), decode=slower)
        zero = replace(plain.prefill, host={}, device={"matmuls": 0.0})
        ours = replace(times, prefill=zero)
        changed = replace(result, times=ours, float_times=replace(plain, prefill=zero))
        assert said in verdict(changed), verdict(changed)
    text = render(result)
    assert "time to first token, ms" in text and "the host rules" in text


def test_cards_divide_matmuls_and_talk(small) -> None:
    request = Request(8, 1024, 16)  # 64 heads, on 24 cores
    one, two = (found(small, request, cards=Cards(c)).times.prefill.device for c in (1, 2))
    assert one["collectives"] == 0
    moved = 8192 * 512 * 2  # o_proj and down_proj of two layers, each with an all-reduce
    assert two["collectives"] == pytest.approx(4 * (10 + moved / 196_000) / 1000)
    assert two["matmuls"] < one["matmuls"] and two["attention"] < one["attention"]
    assert found(small, request, cards=Cards(2)).memory.cache_per_token == 1024


@pytest.mark.parametrize(
    ("cards", "said"),
    [
        (Cards(3), "does not divide 4 heads"),
        (Cards(1, 2), "no experts"),
    ],
)
def test_divisions_that_are_refused(small, cards, said) -> None:
    with pytest.raises(InputError, match=said):
        found(small, cards=cards)


def test_a_mixture_reads_the_experts_that_have_rows(mixture) -> None:
    few, many = (found(mixture, Request(b, 128, 16)).times.decode.device for b in (1, 64))
    assert few["matmuls"] < many["matmuls"]
    notes = " ".join(found(mixture).notes)
    assert "measured on layers of 13 kernels" in notes
    divided = found(mixture, Request(1, 4096, 2), cards=Cards(2, 2)).times.prefill.device
    assert divided["collectives"] > 0
    with pytest.raises(InputError, match="experts lie on the cards"):
        found(mixture, cards=Cards(1, 2))


@pytest.mark.parametrize(
    ("asked", "mode", "said"),
    [
        ("vllm-asend", "graph", "unknown server"),
        ("mindie", "graph", "nobody measured the launch path of mindie"),
        ("vllm-ascend==0.23", "graph", "nobody measured the launch path of vllm-ascend 0.23"),
        ("vllm-ascend==0.9.2", "fast", "graph or eager"),
        ("vllm-ascend=0.9.2", "graph", "neither NAME nor NAME==VERSION"),
        ("", "graph", "neither NAME nor NAME==VERSION"),
    ],
)
def test_what_nobody_measured_is_refused(asked, mode, said) -> None:
    with pytest.raises(PanguqError, match=said):
        find_launch_path(asked, mode)


def test_what_no_server_was_timed_with_is_said(small, mixture) -> None:
    def untimed(graph, mode: str) -> list[str]:
        return [note for note in found(graph, mode=mode).notes if "never timed" in note]

    assert untimed(small, "graph") == []
    (note,) = untimed(small, "eager")
    assert note.startswith("W8A8 was never timed on a server in eager mode")
    (note,) = untimed(mixture, "graph")
    assert note.startswith("W8A8_DYNAMIC was never timed on a server in graph mode")
    assert f"note: {note}" in render(found(mixture))


def test_attention_deals_whole_heads_to_the_cores(small) -> None:
    def attention(batch: int, tokens: int = 2048) -> float:
        return found(small, Request(batch, tokens, 16)).times.prefill.device["attention"]

    heads = PANGU["num_attention_heads"]
    assert attention(24 // heads) == pytest.approx(attention(1), rel=0.05)  # 24 cores
    assert attention(2 * 24 // heads) == pytest.approx(2 * attention(1), rel=0.1)


def test_the_newest_version_by_default() -> None:
    assert find_launch_path("vllm-ascend") == find_launch_path("VLLM-Ascend==0.9.2rc1")
    assert all(path.source for path in LAUNCH_PATHS)


def test_a_request_longer_than_the_model_reads(small) -> None:
    with pytest.raises(InputError, match="more than the 40960"):
        found(small, Request(1, 40960, 1))


def test_the_command(tmp_path, capsys) -> None:
    path = str(config_folder(tmp_path, PANGU))
    asked = ["explain", path, "--scheme", "W8A8-dynamic", "--target", "ascend910b2", "--json"]
    assert main([*asked, "--server", "vllm-ascend==0.9.2", "--mode", "eager", "--batch", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    keys = {"ttft_ms", "tpot_ms", "request_s", "terms", "memory_mib", "largest_batch"}
    assert keys | {"gain_over_float", "verdict"} <= set(data)
    assert data["terms"]["tpot"]["bound_by"] == "host"
    assert data["scheme"] == "W8A8_DYNAMIC" and data["mode"] == "eager"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mode", "eager"], "--mode is for a model on a server"),
        (["--server", "vllm-ascend", "--memory", "many"], "no size of a card"),
        (["--server", "vllm-ascend", "--csv", "x.csv"], "--csv is not for a model on a server"),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, options, said) -> None:
    assert main(["explain", str(config_folder(tmp_path, PANGU)), *options]) == 1
    assert said in capsys.readouterr().err


def test_a_scheme_that_the_server_does_not_take_says_so(tmp_path, capsys) -> None:
    asked = ["explain", str(config_folder(tmp_path, PANGU)), "--scheme", "w4a16", "--server"]
    assert main([*asked, "vllm-ascend"]) == 0
    assert "note: vllm-ascend takes no dense W4A16" in capsys.readouterr().out
