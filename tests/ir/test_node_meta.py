"""What passes know about a node stays with its work, in edits, in copies and in files."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from panguq.dumps.node_metadata import collect, restore
from panguq.ir.edit import call, clone, find_label, merge, replace, split, weights_of
from panguq.ir.input_statistics import InputStatistics
from panguq.ir.node_meta import NodeMeta, annotate, meta_of, scheme_of
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.text.serialize import from_text, to_text
from tests.model_shelf import trace_tiny

aten = torch.ops.aten
ROOT = Path(__file__).parents[2]
ABOUT_THE_INPUT = ("input_statistics", "input_range", "input_clip", "token_weights")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) * self.b(x)


def graph() -> tuple[fx.GraphModule, fx.Node]:
    """Two linears of one value, and the first, about which everything is known."""
    gm, _ = trace_tiny(Pair(), torch.randn(3, 4))
    node = find_label(gm, "a:linear")
    statistics = InputStatistics(4)
    statistics.add(torch.randn(5, 4))
    annotate(
        node,
        scheme=SCHEMES["W8A8"],
        expert_schemes=(SCHEMES["W8A8"], SCHEMES["FLOAT"]),
        split_from="whole:linear",
        merged=("one:linear", "two:linear"),
        input_statistics=statistics,
        input_range=(-1.5, 2.0),
        input_clip=0.75,
        token_weights=(torch.rand(5), torch.rand(3)),
    )
    return gm, node


def known(meta: NodeMeta) -> dict[str, object]:
    """What is known beside the node's own name, place and type."""
    own = ("label", "module_path", "stored_type")
    return {name: value for name, value in meta.filled().items() if name not in own}


def test_the_example_fills_every_field() -> None:
    _, node = graph()
    names = {field.name for field in fields(NodeMeta)}
    assert {*known(meta_of(node)), "label", "module_path", "stored_type"} == names


def test_another_call_of_the_op_takes_over_all() -> None:
    _, node = graph()
    before = known(meta_of(node))
    again = call(node, aten.linear.default, node.args, origin=node, suffix=".again")
    replace(node, again)
    assert known(meta_of(again)) == before
    assert meta_of(again).label == "a:linear.again" and meta_of(again).module_path == "a"


def test_a_call_of_another_op_reads_another_value() -> None:
    _, node = graph()
    before = known(meta_of(node))
    other = call(node, aten.mul.Tensor, (node.args[0], 2.0), origin=node)
    replace(node, other)
    assert known(meta_of(other)) == {k: v for k, v in before.items() if k not in ABOUT_THE_INPUT}


def test_what_is_known_already_stays() -> None:
    _, node = graph()
    again = call(node, aten.linear.default, node.args, origin=node)
    annotate(again, scheme=SCHEMES["FLOAT"])
    replace(node, again)
    assert scheme_of(again).is_float and meta_of(again).input_range == (-1.5, 2.0)


def test_an_operand_learns_nothing_of_a_node_that_is_left_out() -> None:
    gm, node = graph()
    x = node.args[0]
    replace(node, x)
    assert known(meta_of(x)) == {} and node not in gm.graph.nodes


def test_a_split_leaves_the_input_with_the_main_part() -> None:
    _, node = graph()
    before = known(meta_of(node))
    main = call(node, aten.linear.default, node.args, origin=node, suffix=".main")
    side = call(node, aten.linear.default, node.args, origin=node, suffix=".side")
    total = call(node, aten.add.Tensor, (main, side), origin=node)
    (reader,) = node.users
    split(node, main, side, total)
    assert known(meta_of(main)) == before
    assert known(meta_of(side)) == {"split_from": "a:linear"}
    assert known(meta_of(total)) == {} and reader.args[0] is total


def test_a_merged_matmul_knows_whose_work_it_does() -> None:
    gm, node = graph()
    before = known(meta_of(node))
    parts = (node, find_label(gm, "b:linear"))
    (reader,) = node.users
    whole = call(reader, aten.linear.default, node.args, origin=node, suffix=".whole")
    halves = [call(reader, aten.slice.Tensor, (whole, -1, 0, 6), origin=n) for n in parts]
    merge(parts, whole, halves)
    assert known(meta_of(whole)) == before | {"merged": ("one:linear", "two:linear", "b:linear")}
    assert list(reader.args) == halves and not known(meta_of(halves[0]))


def test_no_copy_of_the_graph_hears_of_a_change() -> None:
    gm, node = graph()
    copy = clone(gm)
    annotate(node, scheme=None)
    assert scheme_of(find_label(copy, "a:linear")).name == "W8A8"


def test_files_and_dumps_hold_every_field() -> None:
    """A field that is in neither is lost when a failed pass runs again on what its dump holds."""
    gm, node = graph()
    loaded = from_text(to_text(gm), weights_of(gm))
    restore(loaded, *collect(gm))
    before, after = known(meta_of(node)), known(meta_of(find_label(loaded, "a:linear")))
    assert after.keys() == before.keys()
    for name in ("scheme", "expert_schemes", "split_from", "merged", "input_range"):
        assert after[name] == before[name]
    for found, given in zip(after["token_weights"], before["token_weights"], strict=True):
        assert torch.equal(found, given)
    mine, theirs = (vars(m["input_statistics"]) for m in (before, after))
    assert torch.equal(mine["square_sum"], theirs["square_sum"])
    assert meta_of(find_label(loaded, "b:linear")) == NodeMeta("b:linear", "b", "float32[x_0, 6]")


def test_values_of_one_calibration_are_stored_once() -> None:
    gm, node = graph()
    meta, second = meta_of(node), find_label(gm, "b:linear")
    annotate(second, input_statistics=meta.input_statistics, token_weights=meta.token_weights)
    metadata, tensors = collect(gm)
    assert metadata.statistics == metadata.token_weights == {"a:linear": 0, "b:linear": 0}
    assert [name for name in tensors if name.startswith("token_weights")] == [
        "token_weights/0/000000", "token_weights/0/000001",
    ]  # fmt: skip


def test_no_field_is_spelled_as_a_key_of_meta() -> None:
    """`node.meta["scheme"]` would be another place for the same thing."""
    names = "|".join(field.name for field in fields(NodeMeta))
    key = re.compile(
        rf"""meta(\[|\.\w+\()["']({names})["']|["']({names})["'] (not )?in \S*\.meta\b"""
        rf"""|\.meta\.update\(.*\b({names})="""
    )
    assert key.search('x = n.meta["scheme"]') and key.search('if "scheme" not in n.meta:')
    assert key.search('n.meta.get("label")') and key.search("n.meta.pop('merged')")
    assert key.search("n.meta.update(val=val, module_path='a')")
    folders = ("ir", "kernels", "lowering", "passes", "src", "tests")
    found = {
        str(path.relative_to(ROOT)): match[0]
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__) and (match := key.search(path.read_text()))
    }
    assert not found


def test_what_is_not_known_is_named() -> None:
    gm, node = graph()
    with pytest.raises(LookupError, match="b:linear has no scheme"):
        scheme_of(find_label(gm, "b:linear"))
    with pytest.raises(TypeError, match="shceme"):
        annotate(node, shceme=SCHEMES["FLOAT"])
