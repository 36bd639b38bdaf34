"""Predictions for a whole model: sums of its matmuls, bytes of its weights, its longest chain."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import networkx as nx
import pytest

from panguq.cli import main
from panguq.explain.model import ModelExplanation, _critical_path, explain_model
from panguq.explain.model_text import render
from panguq.forecast.graph import graph_of
from panguq.ir.edit import label
from panguq.ir.node_meta import annotate, scheme_of
from panguq.ir.quant_spec import parse_scheme
from panguq.lowering.targets import find_target
from panguq.passes.pipeline.base import linears
from tests.config_folders import MIXTURE, PANGU, config_folder

SIZES = PANGU | {
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder with nothing but a config."""
    return config_folder(tmp_path_factory.mktemp("pangu"), SIZES)


@pytest.fixture(scope="module")
def w8a8(folder):
    """The graph with W8A8 on every matmul but the logits'."""
    return graph_of(folder, "W8A8", "float16")


def found(graph, **options) -> ModelExplanation:
    gm, interface = graph
    return explain_model(gm, interface, find_target("ascend910b1"), "float16", "W8A8", **options)


def test_matmuls_are_counted_by_shape(w8a8) -> None:
    rows = found(w8a8).matmuls
    shapes = {(row.n, row.k): (row.count, row.scheme) for row in rows if row.scheme != "FLOAT"}
    assert shapes == {  # q and o; k and v; gate and up; down
        (512, 512): (4, "W8A8"),
        (256, 512): (4, "W8A8"),
        (1024, 512): (4, "W8A8"),
        (512, 1024): (2, "W8A8"),
    }
    assert [(row.n, row.count) for row in rows if row.scheme == "FLOAT"] == [(512, 1)]


def test_time_is_the_sum_of_matmuls_and_the_rest(w8a8) -> None:
    result = found(w8a8, prompt=256)
    prefill = sum(row.count * row.prefill_us for row in result.matmuls)
    assert result.prefill.us == pytest.approx(prefill + result.prefill.other_us)
    decode = sum(row.count * row.decode_us for row in result.matmuls)
    assert result.decode.us == pytest.approx(decode + result.decode.other_us)
    assert (result.prefill.tokens, result.decode.tokens) == (256, 1)
    assert result.prefill.gain == pytest.approx(result.prefill.float_us / result.prefill.us)


def test_only_the_last_logits_are_computed(w8a8) -> None:
    logits = next(row for row in found(w8a8, prompt=2048).matmuls if row.scheme == "FLOAT")
    assert logits.prefill_us == logits.decode_us


def test_weight_bytes(w8a8) -> None:
    result = found(w8a8)
    layer = 2 * 512 * 512 + 2 * 256 * 512 + 2 * 1024 * 512 + 512 * 1024
    outputs = 2 * 512 + 2 * 256 + 2 * 1024 + 512
    rest = 2 * 512 * 512 + 512 + 2 * (2 * 512 + 512 + 256 + 256 + 512)  # embeddings, norms, biases
    assert result.weight_bytes == 2 * (layer + 4 * outputs) + 2 * rest + tables(w8a8)
    assert result.float_weight_bytes == 2 * (2 * layer) + 2 * rest + tables(w8a8)


def tables(graph) -> int:
    """Bytes of what is stored besides parameters: rotary frequencies, in the dtype of the model."""
    return sum(
        2 * n.meta["val"].numel()
        for n in graph[0].graph.nodes
        if n.op == "get_attr" and "inv_freq" in str(n.target)
    )


def test_the_critical_path_is_no_longer_than_the_sum(w8a8) -> None:
    result = found(w8a8)
    for phase in (result.prefill, result.decode):
        assert 0 < phase.critical_path_us < phase.us
        names = [name for name in phase.critical_path if "proj" in name]
        assert len(names) == 8  # one of q, k, v; o; one of gate, up; down; in both layers
        layers = [int(name.split("layers.")[1][0]) for name in names]
        assert layers == sorted(layers)


def test_the_critical_path_by_brute_force(w8a8) -> None:
    gm, _ = w8a8
    compute = [n for n in gm.graph.nodes if n.op == "call_function"]
    cost = {n: (len(label(n)) * 7919) % 101 + 0.5 for n in compute}
    path = _critical_path(compute, cost)
    longest: dict = {}
    for node in compute:  # in topological order
        before = [longest[s] for s in node.all_input_nodes if s in longest]
        longest[node] = cost[node] + max(before, default=0.0)
    assert sum(cost[n] for n in path) == pytest.approx(max(longest.values()))
    edges = nx.DiGraph((s, n) for n in compute for s in n.all_input_nodes)
    assert all(edges.has_edge(a, b) for a, b in itertools.pairwise(path))


def test_more_tokens_and_batches_take_longer(w8a8) -> None:
    base, longer, wider = found(w8a8), found(w8a8, prompt=4096), found(w8a8, batch=8)
    assert base.prefill.us < longer.prefill.us and base.prefill.us < wider.prefill.us
    assert base.decode.us <= wider.decode.us and wider.decode.tokens == 8


def test_every_matmul_falls_back_where_the_target_refuses(folder) -> None:
    graph = graph_of(folder, "W4A16", "float16")
    gm, interface = graph
    for node in linears(gm):  # a k of one group: more than k - 1
        if not scheme_of(node).is_float:
            annotate(node, scheme=parse_scheme("w4a16-g32"))
    target = find_target("ascend910b1")
    result = explain_model(gm, interface, target, "float16", "W4A16", weight_format="NZ")
    noted = [row for row in result.matmuls if row.note]
    assert {row.scheme for row in noted} == {"W8A16"}
    assert all("in NZ format only 64 and 128" in row.note for row in noted)
    assert "W4A16-g32 refused" in render(result)


def test_the_command_prints_the_published_gain_beside_the_predicted(folder, capsys) -> None:
    assert main(["explain", str(folder), "--scheme", "w8a8", "--dtype", "float16"]) == 0
    text = capsys.readouterr().out
    assert "prefill of 1024 tokens:" in text and "decode step of 1 tokens:" in text
    assert "1.5 times" in text and "nothing here is fitted to it" in text
    assert "critical path of the prefill: model.layers.0.self_attn" in text


def test_json_and_csv_of_a_model(folder, capsys, tmp_path) -> None:
    path = tmp_path / "all.csv"
    arguments = ["explain", str(folder), "--scheme", "w4a16", "--json", "--csv", str(path)]
    assert main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["prefill"]["gain"] > 0 and data["decode"]["us"] > 0
    assert {row["scheme"] for row in data["matmuls"]} == {"W4A16", "FLOAT"}
    lines = path.read_text().splitlines()
    assert lines[0].startswith("m,n,k,scheme,kernel") and len(lines) > 100
    assert sum(line.startswith("m,n,k") for line in lines) == 1


def test_a_model_on_a_cpu_is_planned_not_explained(folder, capsys) -> None:
    assert main(["explain", str(folder), "--target", "cpu"]) == 1
    assert "--dry-run" in capsys.readouterr().err


def test_experts_read_the_weights_of_those_that_have_rows(tmp_path, capsys) -> None:
    """One token reads 2 of 16 experts, a prompt of 512 all; all are stored."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    assert (
        main(["explain", str(tmp_path), "--scheme", "w8a8_dynamic", "--json", "--prompt", "512"])
        == 0
    )
    data = json.loads(capsys.readouterr().out)
    rows = {row["example"]: row for row in data["matmuls"] if "experts" in row["example"]}
    assert {row["decode_kernel"] for row in rows.values()} == {"npu_grouped_matmul"}
    for row in rows.values():
        assert row["prefill_us"] > row["decode_us"]
    assert data["weight_bytes"] > 16 * 3 * 512 * 256
