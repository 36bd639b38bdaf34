"""A compile that goes on does not repeat checks that it has passed; another compile makes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

from panguq.compile_key import PassedChecks
from panguq.tensors.work_folder import CHECKS, WorkFolder


def graph(op: Callable[..., object]) -> fx.GraphModule:
    made = fx.Graph()
    x = made.placeholder("x")
    x.meta["val"] = torch.zeros(2)
    y = made.call_function(op, (x,))
    y.meta["val"] = torch.zeros(2)
    made.output((y,)).meta["val"] = (torch.zeros(2),)
    return fx.GraphModule(torch.nn.Module(), made)


def compile_once(
    folder: Path, recipe: str, op: Callable[..., object] = torch.ops.aten.neg.default
) -> tuple[float, list[str]]:
    """The check's result, and when it was made: before the key was known, or after."""
    units = WorkFolder(folder)
    made: list[str] = []
    stage = ["before"]

    def check(gm: fx.GraphModule) -> float:
        made.extend([stage[0], *(str(n.target) for n in gm.graph.nodes if n.op == "call_function")])
        return 0.25

    gm = graph(op)
    checks = PassedChecks(units)
    found = checks.once("proof", (gm,), check)
    gm.graph.erase_node(next(iter(gm.graph.nodes)).next.next)  # the output: passes rewrite in place
    units.open_for({"recipe": recipe})
    stage[0] = "after"
    checks.settle()
    units.close()
    return found, made


def test_the_same_compile_knows_what_it_has_passed(tmp_path) -> None:
    assert compile_once(tmp_path / "work", "a") == (0.25, ["before", "aten.neg.default"])
    assert compile_once(tmp_path / "work", "a") == (0.25, [])


def test_another_compile_makes_the_check_on_the_graph_as_it_was(tmp_path) -> None:
    compile_once(tmp_path / "work", "a")
    assert compile_once(tmp_path / "work", "b") == (0.25, ["after", "aten.neg.default"])
    assert compile_once(tmp_path / "work", "b") == (0.25, [])


def test_another_graph_is_checked(tmp_path) -> None:
    compile_once(tmp_path / "work", "a")
    found = compile_once(tmp_path / "work", "a", torch.ops.aten.abs.default)
    assert found == (0.25, ["before", "aten.abs.default"])


@pytest.mark.parametrize("text", [b"", b"{}", b'{"proof 0": 0.0, "sha256": "0"}', b"\xff"])
def test_a_damaged_note_is_no_note(tmp_path, text) -> None:
    compile_once(tmp_path / "work", "a")
    (tmp_path / "work" / CHECKS).write_bytes(text)
    assert compile_once(tmp_path / "work", "a") == (0.25, ["before", "aten.neg.default"])


def test_a_check_that_fails_is_not_noted(tmp_path) -> None:
    units = WorkFolder(tmp_path / "work")
    checks = PassedChecks(units)

    def fails(gm: fx.GraphModule) -> float:
        raise ValueError("differs")

    with pytest.raises(ValueError, match="differs"):
        checks.once("proof", (graph(torch.ops.aten.neg.default),), fails)
    units.open_for({"recipe": "a"})
    checks.settle()
    units.close()
    assert compile_once(tmp_path / "work", "a")[1][0] == "before"
