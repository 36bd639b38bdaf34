"""A compiled model read back as its source's modules, by the source's names."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import panguq
from panguq.decibels import sqnr_db
from panguq.errors import ExportError
from panguq.formats.checkpoint.graph import FAKE_QUANT, CheckpointGraph, read_checkpoint_graph
from panguq.formats.checkpoint.linear import reads_float
from panguq.ir.edit import call, clone, tensor_node
from panguq.ir.node_meta import annotate, meta_of
from panguq.ir.views import Linear
from tests.model_shelf import CONFIGS, shared_model, token_ids, trace_tiny
from tests.shared_traces import shared_traces

WITH_LINEARS = ("llama", "qwen2", "openpangu", "opt")
LAST = ("insert-fake-quant", "quantize-weights")
IDS = token_ids(1, 12)


@pytest.fixture(autouse=True, scope="module")
def one_trace_a_model() -> Iterator[None]:
    with shared_traces():
        yield


def recipe(scheme: str, *passes: Any, **schemes: str) -> dict[str, Any]:
    return {"schemes": {"*": scheme, **schemes}, "passes": [*passes, *LAST]}


@functools.cache
def _compiled(family: str, scheme: str, passes: tuple[str, ...], head: str) -> Any:
    own = {"lm_head": head} if head else {}
    chosen = recipe(scheme, *passes, **own)
    return panguq.compile(shared_model(family), chosen, calibration=token_ids(4, 32))


def compiled(family: str, scheme: str, *passes: str, head: str = "") -> Any:
    return _compiled(family, scheme, passes, head)


def rebuilt(model: Any, graph: CheckpointGraph) -> nn.Module:
    """The source's architecture with the graph's weights, dequantized."""
    config = model.config if graph.is_tied else _untied(model.config)
    result = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = dict(graph.weights)
    for path, linear in graph.quantized.items():
        state[f"{path}.weight"] = linear.dequantized()
        if linear.bias is not None:
            state[f"{path}.bias"] = linear.bias
    missing, unexpected = result.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if graph.is_tied else set())
    return result


def _untied(config: Any) -> Any:
    return type(config)(**{**config.to_dict(), "tie_word_embeddings": False})


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_LINEARS)
def test_every_weight_has_its_name_in_the_source(family: str) -> None:
    graph = read_checkpoint_graph(compiled(family, "W8A16").artifact)
    source = shared_model(family).state_dict()
    for name, tensor in graph.weights.items():
        assert torch.equal(tensor, source[name]), name
    for path, linear in graph.quantized.items():
        weight = source[f"{path}.weight"]
        assert linear.shape == tuple(weight.shape)
        assert sqnr_db(weight, linear.dequantized()) > 40
        assert (linear.bias is None) == (f"{path}.bias" not in source)
    tied = {"lm_head.weight"} if CONFIGS[family].tie_word_embeddings else set()
    quantized = {f"{p}.{leaf}" for p in graph.quantized for leaf in ("weight", "bias")}
    assert set(source) - set(graph.weights) - quantized == tied
    assert graph.float_linears == ("lm_head",)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *((family, "W8A16") for family in WITH_LINEARS),
        ("llama", "W4A16-g32"),
        ("openpangu", "W4A16_ASYM-g32"),
        ("opt", "W4A16-per_channel"),
    ],
)
def test_the_source_with_these_weights_is_the_compiled_model(family: str, scheme: str) -> None:
    model = compiled(family, scheme)
    source = rebuilt(model, read_checkpoint_graph(model.artifact))
    with torch.no_grad():
        assert sqnr_db(model.at_stage(FAKE_QUANT)(IDS).logits, source(IDS).logits) >= 100


@pytest.mark.parametrize("family", ["openpangu", "opt"])
def test_smoothing_is_in_the_weights(family: str) -> None:
    """The norms carry 1 / s and the linears s: together still the source's function."""
    graph = read_checkpoint_graph(compiled(family, "W8A8_DYNAMIC", "smoothquant").artifact)
    source = shared_model(family)
    changed = [n for n, t in graph.weights.items() if not torch.equal(t, source.state_dict()[n])]
    assert any("norm" in name for name in changed)
    model = rebuilt(compiled(family, "W8A8_DYNAMIC", "smoothquant"), graph)
    with torch.no_grad():
        assert sqnr_db(source(IDS).logits, model(IDS).logits) >= 30


def test_a_doubled_weight_is_noticed() -> None:
    """So that the comparisons above can fail."""
    model = compiled("llama", "W8A16")
    source: Any = rebuilt(model, read_checkpoint_graph(model.artifact))
    with torch.no_grad():
        source.model.layers[0].mlp.down_proj.weight.mul_(2)
        assert sqnr_db(model.at_stage(FAKE_QUANT)(IDS).logits, source(IDS).logits) < 30


def test_linears_that_read_one_tensor_have_its_scale_and_zero_point() -> None:
    graph = read_checkpoint_graph(compiled("openpangu", "W8A8", "calibrate").artifact)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    heads = tuple(f"{attention}.{p}_proj" for p in "qkv")
    assert heads in graph.fused
    assert (f"{mlp}.gate_proj", f"{mlp}.up_proj") in graph.fused
    q, k, v = (graph.quantized[path] for path in heads)
    assert q.input_scale is k.input_scale is v.input_scale
    assert q.input_scale is not None and q.input_scale.shape == (1,)
    assert q.input_zero_point is not None and q.input_zero_point.dtype == torch.int32
    assert graph.quantized[f"{mlp}.down_proj"].input_scale is not q.input_scale


@pytest.mark.parametrize("passes", [("smoothquant",), ()])
def test_fused_linears_are_found_whatever_quantizes_their_input(passes: tuple[str, ...]) -> None:
    scheme = "W8A8_DYNAMIC" if passes else "W8A16"
    graph = read_checkpoint_graph(compiled("openpangu", scheme, *passes).artifact)
    assert len(graph.fused) == 4
    assert all(linear.input_scale is None for linear in graph.quantized.values())


def test_four_bit_codes_come_out_one_by_one() -> None:
    graph = read_checkpoint_graph(compiled("llama", "W4A16-g32").artifact)
    linear = graph.quantized["model.layers.0.mlp.down_proj"]
    assert linear.codes().dtype == torch.int8
    assert linear.codes().shape == linear.shape == (64, 96)
    assert linear.codes().min() >= -8 and linear.codes().max() <= 7
    assert linear.weight_scale.shape == (64, 3) and linear.group_size == 32


# --- tied embeddings ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_a_tied_tensor_is_there_once_under_the_embeddings_name(family: str) -> None:
    graph = read_checkpoint_graph(compiled(family, "W8A16").artifact)
    assert graph.is_tied
    assert "lm_head.weight" not in graph.weights
    assert sum(name.endswith("embed_tokens.weight") for name in graph.weights) == 1


def test_a_quantized_head_leaves_the_embedding_float_and_unties_it() -> None:
    model = compiled("qwen2", "W8A16", head="W8A16")
    graph = read_checkpoint_graph(model.artifact)
    assert not graph.is_tied
    assert "lm_head" in graph.quantized
    embedding = shared_model("qwen2").state_dict()["model.embed_tokens.weight"]
    assert torch.equal(graph.weights["model.embed_tokens.weight"], embedding)
    with torch.no_grad():
        logits = rebuilt(model, graph)(IDS).logits
    assert sqnr_db(model.at_stage(FAKE_QUANT)(IDS).logits, logits) >= 100


# --- a saved model ------------------------------------------------------------------------------


def test_a_loaded_model_gives_the_same(tmp_path: Path) -> None:
    model = compiled("qwen2", "W8A8", "calibrate")
    model.save(tmp_path / "out")
    one, other = (
        read_checkpoint_graph(model.artifact),
        read_checkpoint_graph(panguq.load(tmp_path / "out").artifact),
    )
    assert one.fused == other.fused and one.is_tied and other.is_tied
    assert _equal(one.weights, other.weights)
    for path, linear in one.quantized.items():
        again = other.quantized[path]
        assert again.scheme == linear.scheme
        assert torch.equal(again.codes(), linear.codes())
        assert torch.equal(again.weight_scale, linear.weight_scale)


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


# --- what no checkpoint can express --------------------------------------------------------------


def refusal(model: Any) -> ExportError:
    with pytest.raises(ExportError) as caught:
        read_checkpoint_graph(model.artifact)
    assert caught.value.hint
    return caught.value


def test_split_outliers_are_refused_by_module() -> None:
    split = {"outliers": {"treatment": "split", "threshold": 1.0}}
    source = shared_model("llama")
    passes = [{"calibrate": {"observer": "percentile"}}, split]
    model = panguq.compile(source, recipe("W8A8", *passes), calibration=token_ids(4, 32))
    assert "_outliers" in " ".join(str(n.target) for n in model.stages[FAKE_QUANT].graph.nodes)
    error = refusal(model)
    assert "model.layers.0." in error.message and "several matmuls each" in error.message
    assert "w8a8-serving" in error.hint


@pytest.mark.parametrize("kind", ["per_channel", "per_token"])
def test_a_quantized_cache_is_refused(kind: str) -> None:
    cache = {"quantize-kv-cache": {"keys": kind, "values": kind}}
    passes = ["insert-fake-quant", "quantize-weights", cache]
    source = {"schemes": {"*": "W8A16"}, "passes": passes}
    model = panguq.compile(shared_model("llama"), source, calibration=token_ids(2, 32))
    error = refusal(model)
    assert "quantize-kv-cache" in error.hint
    assert "something else than a matmul" in error.message


def test_a_conv1d_is_refused() -> None:
    error = refusal(compiled("gpt2", "W8A16"))
    assert "transformer.h.0.attn.c_attn is a Conv1D" in error.message


def test_other_modules_are_refused() -> None:
    module, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    model = panguq.compile(module, recipe("W8A16"), example_inputs=(x,))
    assert "only a compiled model of transformers" in refusal(model).message


def with_graph(model: Any, change: Any) -> Any:
    """The compiled model with a changed fake-quant graph, as some pass might leave it."""
    gm = clone(model.stages[FAKE_QUANT])
    change(gm)
    gm.recompile()
    changed = model.at_stage(model.stage)
    changed.stages[FAKE_QUANT] = gm
    return changed


def linear_of(gm: Any, path: str) -> Any:
    linears = (n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    return next(n for n in linears if meta_of(n).module_path == path)


def test_a_weight_that_the_architecture_does_not_have_is_refused() -> None:
    def rotate(gm: Any) -> None:
        node = linear_of(gm, "model.layers.0.mlp.down_proj")
        rotation = tensor_node(node, "model.layers.0.mlp.rotation", torch.ones(96))
        product = call(
            node, torch.ops.aten.mul.Tensor, (node.args[0], rotation), origin=node, suffix=".r"
        )
        node.update_arg(0, product)

    error = refusal(with_graph(compiled("llama", "W8A16"), rotate))
    assert "no place for model.layers.0.mlp.rotation" in error.message


def test_a_scheme_that_the_graph_does_not_compute_is_refused() -> None:
    def rename(gm: Any) -> None:
        from panguq.ir.quant_spec import SCHEMES

        node = linear_of(gm, "model.layers.0.mlp.down_proj")
        annotate(node, scheme=SCHEMES["W8A8"])

    error = refusal(with_graph(compiled("llama", "W8A16"), rename))
    assert "does not compute its scheme, W8A8" in error.message


def test_a_config_that_transformers_does_not_know_is_refused() -> None:
    model = compiled("llama", "W8A16").at_stage(FAKE_QUANT)
    kind = type("Mine", (transformers.PretrainedConfig,), {"model_type": "mine"})
    model.config = kind(vocab_size=96)
    assert "config of type 'mine'" in refusal(model).message


def test_a_config_of_another_size_is_refused() -> None:
    model = compiled("llama", "W8A16").at_stage(FAKE_QUANT)
    model.config = transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": 97})
    assert "is [96, 64], the architecture's is [97, 64]" in refusal(model).message
    model.config = transformers.LlamaConfig(
        **{**CONFIGS["llama"].to_dict(), "intermediate_size": 100}
    )
    assert "the architecture's is [100, 64]" in refusal(model).message


class Widened(nn.Module):
    """A router of many mixtures: its weight is stored in 16 bits, and computes in 32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 32))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.dtype), self.weight.to(self.dtype))


def test_a_float_weight_may_be_read_in_another_dtype() -> None:
    gm, _ = trace_tiny(Widened(torch.float64), torch.randn(3, 32))
    (node,) = (node for node in gm.graph.nodes if Linear.match(node) is not None)
    assert not Linear.of(node).is_stored and reads_float(node)
