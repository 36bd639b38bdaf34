"""A sweep that pauses: what it shows, what it replaces, and the float model beside it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import NumericsError
from panguq.ir.edit import label, set_tensor
from panguq.ir.interface import Interface
from panguq.ir.run import sweep as sweep_module
from panguq.ir.run.interpret import run, values
from panguq.ir.run.sweep import solving_sweep
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import linears, no_progress
from tests.model_shelf import Residual, run_passes, tiny_context, trace_tiny

torch.manual_seed(0)
BATCHES = (torch.randn(5, 32), torch.randn(3, 32), torch.randn(4, 32))


class Tied(nn.Module):
    """One weight read by two matmuls, the second behind the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()))


def fake_quant(
    scheme: str = "W4A16-g32", module: nn.Module | None = None
) -> tuple[fx.GraphModule, Interface]:
    gm, interface = trace_tiny(module or Residual(32), torch.randn(3, 32))
    ctx = tiny_context(interface, *BATCHES)
    run_passes(gm, ctx, scheme, Calibrate(), InsertFakeQuant())
    return gm, interface


class Visits:
    """Pauses at the inputs of all matmuls and notes what they are shown; chooses nothing."""

    def __init__(self, gm: fx.GraphModule, chosen: dict[str, dict[fx.Node, Tensor]] | None = None):
        self.order: list[str] = []
        self.seen: dict[str, list[Tensor]] = {}
        self.floats: dict[str, list[Tensor]] = {}
        self.chosen = chosen or {}
        self.pauses = {n.args[0]: self._pause(n) for n in linears_of(gm)}

    def _pause(self, matmul: fx.Node):
        def pause(shown: Sequence[Tensor], floats: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
            name = label(matmul)
            self.order.append(name)
            self.seen[name] = [value.clone() for value in shown]
            self.floats[name] = [value.clone() for value in floats]
            return self.chosen.get(name, {})

        return pause


def linears_of(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default]


def batches(interface: Interface) -> list[dict[str, Tensor]]:
    return [{interface.inputs[0]: batch} for batch in BATCHES]


def swept(gm: fx.GraphModule, interface: Interface, visits: Visits, beside_float: bool = False):
    solving_sweep(gm, batches(interface), visits.pauses, no_progress, beside_float)
    return visits


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W8A8", "W8A8_DYNAMIC", "W4A4"])
def test_without_a_choice_it_shows_what_a_run_computes(scheme) -> None:
    gm, interface = fake_quant(scheme)
    visits = swept(gm, interface, Visits(gm))
    assert visits.order == ["a:linear", "b:linear", "head:linear"]
    for index, batch in enumerate(batches(interface)):
        for matmul in linears_of(gm):
            wanted = values(gm, batch, {matmul.args[0]})[matmul.args[0]]
            assert torch.equal(visits.seen[label(matmul)][index], wanted)
    assert all(not floats for floats in visits.floats.values())


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W8A8"])
def test_what_a_pause_chooses_holds_for_everything_after_it(scheme) -> None:
    """Later blocks see it too, and so does its own matmul: true-sequential."""
    gm, interface = fake_quant(scheme)
    a, b, head = linears_of(gm)
    new = {a.args[1]: torch.randn(32, 32), b.args[1]: torch.randn(32, 32)}
    chosen = {"a:linear": {a.args[1]: new[a.args[1]]}, "b:linear": {b.args[1]: new[b.args[1]]}}
    visits = swept(gm, interface, Visits(gm, chosen))
    for index, batch in enumerate(batches(interface)):
        for matmul, given in ((a, ()), (b, (a,)), (head, (a, b))):
            known = {m.args[1]: new[m.args[1]] for m in given}
            wanted = replaced_run(gm, batch, known, matmul.args[0])
            assert torch.equal(visits.seen[label(matmul)][index], wanted)


def replaced_run(
    gm: fx.GraphModule, batch: dict[str, Tensor], known: dict[fx.Node, Tensor], wanted: fx.Node
) -> Tensor:
    """A plain run in which some nodes have given values."""
    environment: dict[fx.Node, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            environment[node] = batch.get(str(node.target), torch.empty(0))
        elif node.op != "output":
            environment[node] = known.get(node)
            if environment[node] is None:
                environment[node] = sweep_module.compute(gm, node, environment)
    return environment[wanted]


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W8A8", "W8A8_DYNAMIC", "W4A4"])
def test_the_float_model_beside_it_knows_of_no_quantization(scheme) -> None:
    """Neither of activations nor of weights, whatever was chosen for them."""
    gm, interface = fake_quant(scheme)
    a, b, _ = linears_of(gm)
    nothing = torch.zeros(32, 32)
    chosen = {"a:linear": {a.args[1]: nothing}, "b:linear": {b.args[1]: nothing}}
    visits = swept(gm, interface, Visits(gm, chosen), beside_float=True)
    plain, _ = trace_tiny(Residual(32), torch.randn(3, 32))
    for index, batch in enumerate(BATCHES):
        for matmul in linears(plain):
            wanted = values(plain, {interface.inputs[0]: batch}, {matmul.args[0]})[matmul.args[0]]
            assert torch.equal(visits.floats[label(matmul)][index], wanted)
    for index, batch in enumerate(BATCHES):  # and the quantized side does see what was chosen
        known = {a.args[1]: nothing}
        wanted = replaced_run(gm, {interface.inputs[0]: batch}, known, b.args[0])
        assert torch.equal(visits.seen["b:linear"][index], wanted)


def test_constants_are_computed_once_a_block(monkeypatch) -> None:
    """Each weight is read and dequantized once, however many batches there are; never twice for the
    head, whose value no pause needs, and not where a pause chose in its place."""
    gm, interface = fake_quant()
    a = linears_of(gm)[0]
    computed: list[str] = []
    compute = sweep_module.compute

    def spy(gm, node, environment):
        computed.append(label(node))
        return compute(gm, node, environment)

    monkeypatch.setattr(sweep_module, "compute", spy)
    swept(gm, interface, Visits(gm, {"a:linear": {a.args[1]: torch.zeros(32, 32)}}))
    assert computed.count("a:linear") == computed.count("b:linear") == 3
    assert computed.count(label(linears_of(gm)[1].args[1])) == 1
    assert label(a.args[1]) not in computed
    assert "head:linear" not in computed


def test_a_pause_at_a_graph_input_comes_first() -> None:
    gm, interface = fake_quant()
    visits = swept(gm, interface, Visits(gm), beside_float=True)
    assert visits.order[0] == "a:linear"
    for shown in (visits.seen, visits.floats):
        assert all(
            torch.equal(x, batch) for x, batch in zip(shown["a:linear"], BATCHES, strict=True)
        )


def test_a_weight_that_two_matmuls_read_is_replaced_for_both() -> None:
    gm, interface = fake_quant(module=Tied())
    a, b, head = linears_of(gm)
    assert a.args[1] is b.args[1]
    new = torch.randn(32, 32)
    visits = swept(gm, interface, Visits(gm, {"a:linear": {a.args[1]: new}}))
    for index, batch in enumerate(batches(interface)):
        wanted = replaced_run(gm, batch, {a.args[1]: new}, head.args[0])
        assert torch.equal(visits.seen["head:linear"][index], wanted)


def test_values_are_dropped_after_their_last_use(monkeypatch) -> None:
    gm, interface = fake_quant()
    largest = 0
    compute = sweep_module.compute

    def spy(gm, node, environment):
        nonlocal largest
        if node.op == "call_function" and any(n.op != "get_attr" for n in environment):
            live = [n for n in environment if n.op == "call_function" and "weight" not in n.name]
            largest = max(largest, len([n for n in live if n.args and not is_constant(n)]))
        return compute(gm, node, environment)

    monkeypatch.setattr(sweep_module, "compute", spy)
    swept(gm, interface, Visits(gm))
    assert largest == 2  # the stream and one value beside it


def is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" or (
        bool(node.all_input_nodes) and all(is_constant(n) for n in node.all_input_nodes)
    )


def test_the_graph_is_not_changed() -> None:
    gm, interface = fake_quant()
    before = run(gm, batches(interface)[0])[0]
    a = linears_of(gm)[0]
    swept(gm, interface, Visits(gm, {"a:linear": {a.args[1]: torch.zeros(32, 32)}}))
    assert torch.equal(run(gm, batches(interface)[0])[0], before)


def test_progress_counts_blocks() -> None:
    gm, interface = fake_quant()
    steps: list[tuple[int, int]] = []
    solving_sweep(
        gm, batches(interface), Visits(gm).pauses, lambda what, done, of: steps.append((done, of))
    )
    assert [done for done, _ in steps] == list(range(len(steps)))
    assert steps[-1][0] == steps[-1][1] >= 2


def test_a_weight_that_is_not_finite_is_named() -> None:
    gm, interface = fake_quant()
    set_tensor(gm, "b.weight", torch.full((32, 32), float("nan")))
    with pytest.raises(NumericsError, match=r"weight b\.weight"):
        swept(gm, interface, Visits(gm))
