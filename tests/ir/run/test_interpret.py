"""Running a part of a graph holds a computed weight only while something reads it."""

import torch
from torch import fx

from panguq.ir.edit import set_tensor
from panguq.ir.run import interpret
from panguq.tensors.folded_weight import FoldedWeight

aten = torch.ops.aten


def chain(layers: int) -> tuple[fx.GraphModule, list[fx.Node]]:
    """x times one folded weight after the other; all weights are read at the graph's start."""
    root, graph = torch.nn.Module(), fx.Graph()
    value = graph.placeholder("x")
    for i in range(layers):
        set_tensor(root, f"w{i}", FoldedWeight(torch.eye(4) * 2, {0: torch.ones(4).double()}))
    weights = [graph.create_node("get_attr", f"w{i}") for i in range(layers)]
    linears = []
    for weight in weights:
        value = graph.call_function(aten.linear.default, (value, weight))
        linears.append(value)
    graph.output((value,))
    return fx.GraphModule(root, graph), linears


def test_weights_are_computed_when_they_are_needed(monkeypatch) -> None:
    gm, linears = chain(3)
    order, compute = [], interpret.compute

    def noted(module, node, environment):
        order.append(node.name)
        return compute(module, node, environment)

    monkeypatch.setattr(interpret, "compute", noted)
    found = interpret.values(gm, {"x": torch.ones(1, 4)}, [linears[-1]])
    assert torch.equal(found[linears[-1]], torch.full((1, 4), 8.0))
    names = [n.name for n in linears]
    assert order == ["w0", names[0], "w1", names[1], "w2", names[2]]


def test_a_weight_itself_may_be_wanted_and_read_twice() -> None:
    gm, linears = chain(1)
    weight = linears[0].args[1]
    with gm.graph.inserting_after(linears[0]):
        again = gm.graph.call_function(aten.linear.default, (linears[0], weight))
    found = interpret.values(gm, {"x": torch.ones(1, 4)}, [again, weight])
    assert torch.equal(found[again], torch.full((1, 4), 4.0))
    assert torch.equal(found[weight], torch.eye(4) * 2)
