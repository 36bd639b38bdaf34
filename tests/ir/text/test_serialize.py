import copy
import json
import keyword
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import panguq.ir.ops.quantize  # noqa: F401  (defines ops)
from panguq.errors import StorageError
from panguq.ir.edit import call, find_label, label, weights_of
from panguq.ir.exported_graph import shape_of
from panguq.ir.interface import Interface
from panguq.ir.node_meta import annotate, meta_of, scheme_of
from panguq.ir.ops import opset
from panguq.ir.quant_spec import SCHEMES, parse_scheme
from panguq.ir.text.serialize import from_dict, from_text, to_dict, to_text
from panguq.ir.text.size_expression import evaluate_size, names_in
from panguq.ir.text.value_types import restore_types
from panguq.ir.trace import trace_module
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import PassContext
from panguq.tensors.weight_store import WeightStore

aten = torch.ops.aten


class SmallTransformer(nn.Module):
    """Not from transformers: own attention with a -inf mask, GLU, split and chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.up = nn.Linear(16, 64, bias=False)
        self.down = nn.Linear(32, 16)
        self.register_buffer("scale", torch.tensor(0.25))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        batch, seq, _ = x.shape
        parts = self.qkv(self.norm(x)).split(16, dim=-1)
        q, k, v = (part.reshape(batch, seq, 4, 4).transpose(1, 2) for part in parts)
        future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        scores = ((q @ k.transpose(2, 3)) * self.scale).masked_fill(future, float("-inf"))
        mixed = torch.softmax(scores, -1) @ v
        x = x + mixed.transpose(1, 2).reshape(batch, seq, 16)
        left, right = self.up(x).chunk(2, -1)
        return self.down(functional.gelu(left, approximate="tanh") * right.sigmoid())


def _sizes(**more: int) -> dict[str, int]:
    return {"vocab_size": 40, "max_position_embeddings": 64, **more}


_LLAMA = _sizes(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **_sizes(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4),
            word_embed_proj_dim=16,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    ),
    "own": SmallTransformer,
}


def build(name: str, canonical: bool = True) -> tuple[fx.GraphModule, Interface]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if name == "own":
        gm, interface = trace_module(model, [torch.zeros(3, 5, dtype=torch.long)])
    else:
        gm, interface = trace_causal_lm(model)
    if canonical:
        Canonicalize().run(gm, PassContext(interface, WeightStore()))
    return gm, interface


def example_inputs(interface: Interface) -> list[Tensor]:
    torch.manual_seed(1)
    sizes = dict.fromkeys(["batch", "seq", "past", "kept", "tokens_0", "tokens_1"], 2)
    sizes |= {"seq": 3, "past": 4}
    inputs = []
    for name, shape in interface.input_shapes.items():
        shape = tuple(evaluate_size(str(size), sizes) for size in shape)
        if name == "attention_mask":
            inputs.append(torch.ones(shape, dtype=torch.bool))
        elif name.startswith("past_"):
            inputs.append(torch.randn(shape))
        else:
            inputs.append(torch.randint(0, 2, shape))
    return inputs


@pytest.fixture(scope="module")
def llama() -> tuple[fx.GraphModule, Interface]:
    return build("llama")


@pytest.mark.parametrize("canonical", [False, True], ids=["trace", "canonical"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_graph_is_the_same_graph(name: str, canonical: bool) -> None:
    gm, interface = build(name, canonical)
    text = to_text(gm)
    loaded = from_text(text, weights_of(gm))
    assert to_text(loaded) == text
    inputs = example_inputs(interface)
    with torch.no_grad():
        for mine, theirs in zip(gm(*inputs), loaded(*inputs), strict=True):
            assert torch.equal(mine, theirs)

    restore_types(loaded, Interface.model_validate_json(interface.model_dump_json()))
    assert to_text(loaded) == text
    for old, new in zip(gm.graph.nodes, loaded.graph.nodes, strict=True):
        assert label(old) == meta_of(new).label
        if isinstance(old.meta.get("val"), Tensor):
            assert shape_of(gm, old) == shape_of(loaded, new)
            assert old.meta["val"].dtype == new.meta["val"].dtype
    output = loaded.graph.output_node()  # and passes can go on from here
    first = output.args[0][0]
    doubled = call(output, aten.add.Tensor, (first, first), origin=first)
    assert shape_of(loaded, doubled) == shape_of(loaded, first)


def one_node(target: Any, *args: Any, **kwargs: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    args = tuple(x if arg == "x" else arg for arg in args)
    graph.output((graph.call_function(target, args, kwargs),))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    "value",
    [float("inf"), float("-inf"), -0.0, 1e-45, 1.7976931348623157e308, 0.1, 3, -(2**63), True],
)
def test_numbers_survive_exactly(value: float) -> None:
    gm = one_node(aten.full_like.default, "x", value)
    loaded = from_text(to_text(gm), {})
    (old,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    (new,) = [n for n in loaded.graph.nodes if n.op == "call_function"]
    assert repr(new.args[1]) == repr(old.args[1])


def test_nan_survives() -> None:
    loaded = from_text(to_text(one_node(aten.add.Scalar, "x", float("nan"))), {})
    assert loaded(torch.zeros(1))[0].isnan()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dtype": torch.bfloat16, "device": torch.device("cpu"), "layout": torch.strided},
        {"memory_format": torch.contiguous_format},
    ],
)
def test_constants_survive(kwargs: dict[str, Any]) -> None:
    loaded = from_text(to_text(one_node(aten._to_copy.default, "x", **kwargs)), {})
    (node,) = [n for n in loaded.graph.nodes if n.op == "call_function"]
    assert node.kwargs == kwargs


def test_lists_stay_lists_and_tuples_tuples() -> None:
    gm = one_node(aten.expand.default, "x", [2, -1])
    nodes = [*gm.graph.nodes]
    nodes[2].args = ((nodes[1], (nodes[0],)),)
    loaded = from_dict(json.loads(json.dumps(to_dict(gm))), {})
    nodes = [*loaded.graph.nodes]
    assert nodes[1].args[1] == [2, -1] and isinstance(nodes[1].args[1], list)
    assert nodes[2].args[0] == (nodes[1], (nodes[0],))


def test_schemes_survive(llama: tuple[fx.GraphModule, Interface]) -> None:
    gm = llama[0]
    where = "model.layers.0.mlp.up_proj:linear"
    for scheme in (*SCHEMES.values(), parse_scheme("W4A16-g64"), parse_scheme("w4a16-PER_channel")):
        annotate(find_label(gm, where), scheme=scheme)
        loaded = from_text(to_text(gm), weights_of(gm))
        assert scheme_of(find_label(loaded, where)) == scheme
    annotate(find_label(gm, where), scheme=None)


def test_ops_of_kernels_with_several_results() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    pair = graph.call_function(torch.ops.panguq.quantize_per_token.default, (x, 127))
    names = opset.resolve("operator.getitem")
    graph.output(tuple(graph.call_function(names, (pair, i)) for i in (0, 1)))  # type: ignore[arg-type]
    gm = fx.GraphModule(nn.Module(), graph)
    loaded = from_text(to_text(gm), {})
    x = torch.randn(3, 8)
    assert all(torch.equal(a, b) for a, b in zip(gm(x), loaded(x), strict=True))


# --- what cannot be saved ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        (aten.relu_.default, ("x",), r"aten\.relu_\.default is not among the ops"),
        (aten.rand_like.default, ("x",), "is not among the ops"),
        (print, ("x",), "is not among the ops"),
        (aten.add.Scalar, ("x", 1j), "cannot save an argument of type complex"),
        (aten.add.Scalar, ("x", slice(1)), "cannot save an argument of type slice"),
    ],
)
def test_what_cannot_be_saved(target: Any, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(StorageError, match=message):
        to_dict(one_node(target, *args))


def test_names_that_cannot_be_saved() -> None:
    gm = one_node(aten.relu.default, "x")
    next(iter(gm.graph.nodes)).target = "*args"
    with pytest.raises(StorageError, match="cannot name an input"):
        to_dict(gm)


def test_listed_ops_are_pure_and_named_once() -> None:
    for name in opset.allowed_ops():
        op = opset.resolve(name)
        assert opset.name_of(op) == name and opset.is_allowed(op)
        if isinstance(op, torch._ops.OpOverload):
            assert not op._schema.is_mutable, name
            random = torch.Tag.nondeterministic_seeded in op.tags
            assert not random or "dropout" in str(op._schema), name
    for name in ("aten.from_file.default", "aten.set_.default", "os.system", "builtins.eval", ""):
        assert opset.resolve(name) is None
    for target in (aten.relu_.default, eval, [], "aten.relu.default", None):
        assert not opset.is_allowed(target)


# --- malformed files ----------------------------------------------------------------------------


def edit_file(
    llama: tuple[fx.GraphModule, Interface], change: Callable[[dict[str, Any]], None]
) -> None:
    data = to_dict(llama[0])
    data = json.loads(json.dumps(data))
    change(data)
    from_dict(data, weights_of(llama[0]), "graph.json")


def linear(data: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in data["nodes"] if n["target"] == "aten.linear.default")


def weight(data: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in data["nodes"] if n["target"].endswith("q_proj.weight"))


def deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda d: d.update(format="other"), "graph.json: not a graph of panguq"),
    "version": (lambda d: d.update(version=2), "graph version 2, but this panguq reads 1"),
    "version is true": (lambda d: d.update(version=True), "graph version True"),
    "no nodes": (lambda d: d.update(nodes={}), "a list of nodes"),
    "more": (lambda d: d.update(code="import os"), "a list of nodes"),
    "empty": (lambda d: d["nodes"].clear(), "has no output"),
    "no output": (lambda d: d["nodes"].pop(), "has no output"),
    "two outputs": (lambda d: d["nodes"].append(d["nodes"][-1]), "after the output"),
    "node is text": (lambda d: d["nodes"].__setitem__(3, "x"), "graph.json: node 3: not a node"),
    "field": (lambda d: linear(d).update(code=""), "unknown fields: ['code']"),
    "label": (lambda d: linear(d).update(label=1), "label is not text"),
    "target": (lambda d: linear(d).update(target=[]), "target is not text"),
    "kind": (lambda d: linear(d).update(op="call_method"), "unknown kind of node call_method"),
    "op": (lambda d: linear(d).update(target="aten.hack.default"), "unknown op 'aten.hack.defa"),
    "python": (lambda d: linear(d).update(target="builtins.eval"), "unknown op 'builtins.eval'"),
    "args": (lambda d: linear(d).update(args={}), "args is no list"),
    "forward": (lambda d: linear(d)["args"].__setitem__(0, {"node": 500}), "args[0]: refers to"),
    "negative": (lambda d: linear(d)["args"].__setitem__(0, {"node": -1}), "refers to node -1"),
    "truth": (lambda d: linear(d)["args"].__setitem__(0, {"node": True}), "refers to node True"),
    "huge node": (lambda d: linear(d)["args"].__setitem__(0, {"node": 10**99}), "refers to node"),
    "huge int": (lambda d: linear(d)["args"].__setitem__(0, 2**63), "args[0]: an integer beyond"),
    "inf": (lambda d: linear(d)["args"].__setitem__(0, float("inf")), "written as a number"),
    "deep": (lambda d: linear(d)["args"].__setitem__(0, deep(99)), "nested deeper than 8"),
    "dict": (lambda d: linear(d)["args"].__setitem__(0, {"a": 1, "b": 2}), "not an argument"),
    "wrapper": (lambda d: linear(d)["args"].__setitem__(0, {"code": "x"}), "unknown 'code'"),
    "dtype": (lambda d: linear(d)["args"].__setitem__(0, {"dtype": "save"}), "unknown 'dtype'"),
    "device": (lambda d: linear(d)["args"].__setitem__(0, {"device": "disk"}), "unknown device"),
    "npu": (lambda d: linear(d)["args"].__setitem__(0, {"device": "npu"}), "has no device 'npu'"),
    "too few": (lambda d: linear(d)["args"].__delitem__(slice(1, None)), "misses weight"),
    "too many": (lambda d: linear(d)["args"].extend([1, 2]), "arguments it cannot take"),
    "keyword": (
        lambda d: linear(d).update(kwargs={"bias=print('!'), **x": None}),
        "arguments it cannot take",
    ),
    "a sum of one": (
        lambda d: linear(d).update(target="operator.add", args=[1]),
        "operator.add takes 2 arguments",
    ),
    "twice": (lambda d: linear(d).update(kwargs={"input": None}), "arguments it cannot take"),
    "no weight": (lambda d: weight(d).update(target="lost"), "there is no weight lost"),
    "weight type": (
        lambda d: weight(d).update(type="float32[1, 2]"),
        "q_proj.weight is float32[16, 16], but the graph wants float32[1, 2]",
    ),
    "untyped": (lambda d: weight(d).pop("type"), "the graph wants no type"),
    "weight args": (lambda d: weight(d).update(args=[1]), "has no such arguments"),
    "dunder": (lambda d: weight(d).update(target="__class__.w"), "cannot name a weight"),
    "method": (lambda d: weight(d).update(target="forward"), "cannot name a weight"),
    "quote": (lambda d: weight(d).update(target='a");print("'), "cannot name a weight"),
    "input code": (lambda d: d["nodes"][0].update(target="x=print('!')"), "cannot name an input"),
    "input keyword": (lambda d: d["nodes"][0].update(target="lambda"), "cannot name an input"),
    "same input": (lambda d: d["nodes"][1].update(target="input_ids"), "a second input input_ids"),
    "scheme": (lambda d: linear(d).update(scheme="W3A3"), "unknown scheme 'W3A3'"),
    "output args": (lambda d: d["nodes"][-1].update(args=[]), "an output has one argument"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_graphs(llama: tuple[fx.GraphModule, Interface], case: str) -> None:
    change, message = BROKEN[case]
    with pytest.raises(StorageError) as caught:
        edit_file(llama, change)
    assert message in caught.value.message and caught.value.hint
    assert caught.value.message.startswith("graph.json: ")


def test_text_of_a_file_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    attack = f"\n    open({str(mark)!r}, 'w') #')\n"
    data = to_dict(one_node(aten.gelu.default, "x", approximate="tanh"))
    data["nodes"][1] |= {"kwargs": {"approximate": attack}, "label": attack}
    data["nodes"][1] |= {"module_path": attack, "type": attack}
    loaded = from_dict(data, {})
    with pytest.raises(RuntimeError, match="approximate"):
        loaded(torch.zeros(1))
    assert not mark.exists()


def test_an_unknown_op_is_named_with_its_place(
    llama: tuple[fx.GraphModule, Interface],
) -> None:
    with pytest.raises(StorageError) as caught:
        edit_file(llama, lambda d: linear(d).update(target="panguq.future.default"))
    assert "(model.layers.0.self_attn.q_proj:linear): unknown op" in caught.value.message
    assert "panguq.future.default" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"version": NaN}', b"\xff", "[]", "1"])
def test_text_that_is_no_graph(text: str | bytes) -> None:
    with pytest.raises(StorageError, match=r"^graph\.json: "):
        from_text(text, {}, "graph.json")


def test_a_weight_inside_a_weight() -> None:
    reads = [
        {"op": "get_attr", "target": name, "type": "float32[1]"} for name in ("a", "a.b", "a.b.c")
    ]
    output = {"op": "output", "target": "output", "args": [{"node": 0}]}
    tensors = {name: torch.zeros(1) for name in ("a", "a.b", "a.b.c")}
    for nodes in (reads[:2], reads[1::-1], reads[::2]):
        data = {"format": "panguq-graph", "version": 1, "nodes": [*nodes, output]}
        with pytest.raises(StorageError, match="inside another weight"):
            from_dict(data, tensors)


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["node", "tuple", "dtype", "device", "float", "op", "x"]), inner
        )
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_gives_a_graph_or_a_storage_error(
    llama: tuple[fx.GraphModule, Interface], data: st.DataObject
) -> None:
    graph = copy.deepcopy(to_dict(llama[0]))
    node = data.draw(st.sampled_from(graph["nodes"]))
    fields = ["label", "op", "target", "type", "args", "kwargs", "module_path", "scheme", "x"]
    place: Any = node
    key: Any = data.draw(st.sampled_from(fields))
    if isinstance(node.get(key), list) and node[key] and data.draw(st.booleans()):
        place, key = node[key], data.draw(st.integers(0, len(node[key]) - 1))
    place[key] = data.draw(_JUNK)
    try:
        loaded = from_dict(graph, weights_of(llama[0]))
        restore_types(loaded, llama[1])
    except StorageError as error:
        assert error.hint


# --- value types --------------------------------------------------------------------------------


def test_types_that_differ_are_refused(llama: tuple[fx.GraphModule, Interface]) -> None:
    gm, interface = llama
    data = to_dict(gm)
    linear(data)["type"] = "float32[batch, seq, 17]"
    loaded = from_dict(data, weights_of(gm))
    with pytest.raises(StorageError, match=r"q_proj:linear yields float32\[batch, seq, 16\], but"):
        restore_types(loaded, interface)


def test_arguments_that_do_not_fit_are_refused(llama: tuple[fx.GraphModule, Interface]) -> None:
    gm, interface = llama
    data = to_dict(gm)
    linear(data)["args"][0] = {"node": 0}
    with pytest.raises(StorageError, match="q_proj:linear cannot take its arguments"):
        restore_types(from_dict(data, weights_of(gm)), interface)


def test_an_interface_of_another_graph(llama: tuple[fx.GraphModule, Interface]) -> None:
    gm, interface = llama
    loaded = from_dict(to_dict(gm), weights_of(gm))
    other = interface.model_copy(update={"input_shapes": {"tokens": ("batch", "seq")}})
    with pytest.raises(StorageError, match="input input_ids has no shape in the interface"):
        restore_types(loaded, other)
    untyped = one_node(aten.relu.default, "x")
    with pytest.raises(StorageError, match="input x has no dtype"):
        restore_types(
            from_dict(to_dict(untyped), {}),
            interface.model_copy(update={"input_shapes": {"x": (2,)}}),
        )


# --- sizes as text ------------------------------------------------------------------------------

_NAME = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name)
)
_SIZE = st.recursive(
    st.integers(0, 10**6).map(str) | _NAME,
    lambda inner: (
        st.tuples(inner, st.sampled_from([" + ", " - ", "*", "//", " * "]), inner).map("".join)
        | inner.map("({})".format)
        | inner.map("-{}".format)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(text=_SIZE, data=st.data())
def test_sizes_mean_what_python_means(text: str, data: st.DataObject) -> None:
    sizes = {name: data.draw(st.integers(1, 100)) for name in names_in(text)}
    try:
        expected = eval(text, {"__builtins__": {}}, sizes)
    except ZeroDivisionError:
        with pytest.raises(StorageError, match="division by zero"):
            evaluate_size(text, sizes)
    else:
        assert evaluate_size(text, sizes) == expected


_NO_SIZES = [
    *("", " ", "a b", "1 2", "a +", "+ a", "(a", "a)", "()", "a ** 2", "a / 2", "a.b", "a[0]"),
    *("f(a)", "unknown", "__import__('os')", "a if a else a", "9" * 19, "1e9", "a // 0", "ä"),
    *("a\x00", "1_000", "0x1", "a,a", "(" * 99 + "a" + ")" * 99, "-" * 200 + "a"),
    "a + " * 200 + "a",
]


@pytest.mark.parametrize("text", _NO_SIZES)
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(StorageError, match="size"):
        evaluate_size(text, {"a": 3})
