"""Whole lowered graphs: every npu call of every scheme, both dtypes, SmolLM2's and openPangu-1B's
widths and two mixtures of experts, against the real Meta kernels, torchair and the C++ host code.

openPangu-7B makes the same kinds of call at other widths, which test_meta.py asks one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.export import Dim

from conformance.calls import ask_contract, ask_host, ask_meta
from conformance.ge_graph import Plain, convert, summary
from conformance.graph_calls import disagreement, namespace_of, node_calls, npu_nodes
from conformance.models import SCHEMES, SIZES, compiled, inputs_of, with_graph
from conformance.recorder import take_record
from conformance.vendor_only import vendor_only
from panguq.ir.edit import clone
from panguq.lowering.run.prepack import prepack

Model = tuple[str, str, str]
NAMES, DTYPES = ("smollm2-135m", "openpangu-1b"), ("bfloat16", "float16")
MODELS = [(name, scheme, dtype) for name in NAMES for scheme in SCHEMES for dtype in DTYPES]
# In float16 experts are combined by an op that torchair does not convert (docs/ascend.md).
MODELS += [
    ("qwen3-moe", scheme, "bfloat16") for scheme in ("W8A8_DYNAMIC", "W4A16", "W4A8", "FLOAT")
]
MODELS += [("glm4-moe", "W8A8_DYNAMIC", "bfloat16")]
each_model = pytest.mark.parametrize("model", MODELS, ids="-".join, scope="module")


def is_golden(model: Model) -> bool:
    """Whose calls are kept word by word. Those of the others are checked, not kept."""
    return model[0] == "openpangu-1b" and model[2] == "bfloat16"


@functools.lru_cache(maxsize=1)
def vendor_graph(model: Model) -> fx.GraphModule:
    """The model's lowered graph with CANN's kernels in the place of panguq's own."""
    return vendor_only(compiled(*model).graph)


@functools.lru_cache(maxsize=1)
def runnable(model: Model) -> fx.GraphModule:
    """The same with its weights in the kernels' layout."""
    return prepack(clone(vendor_graph(model)))


@each_model
def test_meta_kernels_agree_with_the_graph(model: Model) -> None:
    """Same dtypes and symbolic sizes, and no guard on a size: both graphs, all npu calls."""
    for graph in (compiled(*model).graph, vendor_graph(model)):
        nodes = npu_nodes(graph)
        assert nodes
        assert [found for found in map(disagreement, nodes) if found is not None] == []


@each_model
def test_only_known_ops_remain(model: Model) -> None:
    """ATen, torch_npu's ops, and panguq's own kernels or tables of kernels."""
    lowered = compiled(*model).graph.graph.nodes
    assert {namespace_of(node) for node in lowered} <= {"", "aten", "npu", "panguq_npu", "panguq"}
    tables = {str(node.target) for node in lowered if namespace_of(node) == "panguq"}
    assert tables <= {"panguq.dispatch_matmul.default"}
    assert {namespace_of(node) for node in runnable(model).graph.nodes} <= {"", "aten", "npu"}


@each_model
def test_calls_with_known_sizes_reach_aclnn(
    model: Model, golden: Callable[[str, str], None]
) -> None:
    """Contract, Meta kernel and C++ code take each call and give the graph's types."""
    lines = []
    for node in node_calls(vendor_graph(model), SIZES):
        assert ask_contract(node.call).refusal is None
        meta = ask_meta(node.call)
        host, record = ask_host(node.call)
        assert meta.refusal is None
        assert host.refusal is None
        assert meta.results == host.results == node.results
        lines.append(f"{node.label}\n  {node.call}\n")
        lines += [f"    {line}\n" for line in record.splitlines()]
    text = "".join(lines)
    assert "NOT-A-TENSOR" not in text
    assert "arguments not recorded" not in text
    if is_golden(model):
        golden(f"aclnn-{model[0]}-{model[1]}", text)


@each_model
def test_torchair_converts_the_graph(model: Model, golden: Callable[[str, str], None]) -> None:
    """The GE operators, their attributes and dtypes, with how many of each."""
    graph = runnable(model)
    text = summary(convert(graph, inputs_of(compiled(*model), graph, SIZES)))
    assert "MatMul" in text or "Matmul" in text
    if is_golden(model):
        golden(f"ge-{model[0]}-{model[1]}", text)


@each_model
def test_graph_exports_again_with_dynamic_sizes(model: Model) -> None:
    """On fake npu tensors; Dim.DYNAMIC is an error for a size that the ops fix to a number."""
    whole = compiled(*model)
    shapes = [
        {axis: Dim.DYNAMIC for axis, size in enumerate(shape) if isinstance(size, str)}
        for shape in whole.interface.input_shapes.values()
    ]
    on_npu = with_graph(whole, vendor_graph(model)).to("npu").executable
    inputs = inputs_of(whole, on_npu, {**SIZES, "kept": 3})
    exported = torch.export.export(
        Plain(on_npu), tuple(x.npu() for x in inputs), dynamic_shapes=(tuple(shapes),)
    )
    codes = [node for node in exported.graph.nodes if namespace_of(node) == "npu"]
    assert len(codes) == len(npu_nodes(on_npu))
    logits = exported.graph.output_node().args[0][0].meta["val"]
    assert isinstance(logits.shape[0], torch.SymInt)
    assert logits.device.type == "npu"


@each_model
def test_graph_runs_to_its_end_on_the_pretend_device(model: Model) -> None:
    """Every op of the graph, ATen's too, has host code for an NPU; what it computes is garbage."""
    whole = with_graph(compiled(*model), vendor_graph(model)).to("npu")
    take_record()
    result = whole(input_ids=torch.ones(2, 7, dtype=torch.int64))
    assert list(result.logits.shape[:2]) == [2, 7]
    record = take_record()
    assert "NOT-A-TENSOR" not in record
    assert "aclnnRmsNorm(" in record


@pytest.mark.parametrize(
    "name, op",
    [("qwen3-moe", "npu_moe_gating_top_k_softmax"), ("glm4-moe", "npu_moe_gating_top_k")],
)
def test_a_router_is_one_op(name: str, op: str) -> None:
    graph = compiled(name, "W8A8_DYNAMIC", "bfloat16").graph
    called = [str(node.target) for node in npu_nodes(graph)]
    assert called.count(f"npu.{op}.default") == 1
    assert called.count("npu.npu_grouped_matmul.default") == 2


def test_a_type_that_is_wrong_is_seen() -> None:
    """A graph that says another dtype or size than torch_npu."""
    graph = compiled("smollm2-135m", "W8A8_DYNAMIC", "bfloat16").graph
    nodes = [node for node in npu_nodes(graph) if isinstance(node.meta["val"], torch.Tensor)]
    assert nodes
    for node in nodes:
        right = node.meta["val"]
        with right.fake_mode:
            wrongs = [right.new_empty(right.shape, dtype=torch.int16), right[..., :-1]]
        for wrong in wrongs:
            node.meta["val"] = wrong
            assert "torch_npu says" in (disagreement(node) or "")
        node.meta["val"] = right
        assert disagreement(node) is None


def test_an_op_that_fixes_a_size_is_seen() -> None:
    """The export fails where the number of tokens cannot stay symbolic."""

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.npu.npu_swiglu(x.view(6, 8), -1)

    with pytest.raises(Exception, match=r"specialized|constant|Constraints"):
        torch.export.export(
            Fixed(), (torch.zeros(3, 16, device="npu").half(),), dynamic_shapes=({0: Dim.DYNAMIC},)
        )
