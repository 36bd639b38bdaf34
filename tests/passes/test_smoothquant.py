"""SmoothQuant: the formula, what is left alone and why, and that the function stays the same."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.nn import functional

from panguq.errors import InputError, NumericsError, RecipeError
from panguq.ir.analysis.channels import KINDS
from panguq.ir.edit import clone, find_label, get_tensor, weights_of
from panguq.ir.interface import Interface
from panguq.ir.node_meta import annotate, meta_of
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.run.interpret import run, values
from panguq.ir.trace import trace_module
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import PassContext, PassResult, linears
from panguq.passes.smoothquant import SmoothQuant, smoothing_scale
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import TwoLinears

GROUPED = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=64, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**GROUPED, attention_bias=True),
    "qwen2": transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "phi3": transformers.Phi3Config(**GROUPED),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
    "opt": transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}  # fmt: skip


def prepared(
    gm: fx.GraphModule, interface: Interface, scheme: str = "W8A8"
) -> tuple[fx.GraphModule, PassContext]:
    ctx = PassContext(interface, WeightStore())
    Canonicalize().run(gm, ctx)
    AssignSchemes(schemes=(("*", scheme),)).run(gm, ctx)
    return gm, ctx


def chain(
    scheme: str = "W8A8", dtype: torch.dtype = torch.float32
) -> tuple[fx.GraphModule, PassContext]:
    x = torch.randn(3, 5, 8).to(dtype)
    gm, ctx = prepared(
        *trace_module(TwoLinears(8, 12, 8, norm=True).to(dtype).eval(), (x,)), scheme
    )
    name = ctx.interface.inputs[0]
    batches = [{name: torch.randn(3, 5, 8).to(dtype)} for _ in range(2)]
    for node in linears(gm):  # the second one gives the graph's output and would stay float
        annotate(node, scheme=SCHEMES[scheme])
    return gm, replace(ctx, batches=batches)


def lm_batch(interface: Interface, tokens: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, tokens), generator=torch.Generator().manual_seed(seed))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril(),
        "position_ids": torch.arange(tokens).expand(2, tokens),
        "logit_positions": torch.arange(tokens),
    }
    for name, layer in zip(interface.inputs[4::2], interface.cache, strict=True):
        batch[name] = torch.zeros(2, layer.heads, 0, layer.key_dim).double()
        value = name.replace("key", "value")
        batch[value] = torch.zeros(2, layer.heads, 0, layer.value_dim).double()
    return batch


@functools.cache
def _traced(name: str) -> tuple[nn.Module, fx.GraphModule, PassContext]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    gm, ctx = prepared(*trace_causal_lm(model))
    return model, gm, replace(ctx, batches=[lm_batch(ctx.interface, 7, s) for s in (1, 2)])


def language_model(name: str) -> tuple[nn.Module, fx.GraphModule, PassContext]:
    model, gm, ctx = _traced(name)
    return model, clone(gm), ctx


def assert_equal(before: Tensor, after: Tensor) -> None:
    assert before.shape == after.shape
    assert ((before - after).abs().max() / before.abs().max()).item() < 1e-10


def table(result: PassResult) -> list[dict[str, object]]:
    scales = result.tables["scales"]
    return [dict(zip(scales.columns, row, strict=True)) for row in scales.rows]


# --- the formula --------------------------------------------------------------------------------


def test_scales_by_hand() -> None:
    act = torch.tensor([4.0, 1.0, 0.0, 9.0, 1e-30])
    weight = torch.tensor([1.0, 4.0, 2.0, 0.0, 1.0])
    half = smoothing_scale(act, weight, 0.5)
    expected = [2.0, 0.5, 1.0, 3 / 1e-5**0.5, 1e-5]
    assert torch.allclose(half, torch.tensor(expected, dtype=torch.float64), rtol=1e-6)
    assert torch.equal(smoothing_scale(act[:2], weight[:2], 1.0), act[:2].double())
    assert torch.equal(smoothing_scale(act[:2], weight[:2], 0.0), 1 / weight[:2].double())


def test_weights_by_hand() -> None:
    """Both sites of the chain; `first.weight` takes up the scales of both."""
    gm, ctx = chain()
    old = {name: tensor.clone() for name, tensor in weights_of(gm).items()}
    inputs = torch.cat([next(iter(batch.values())) for batch in ctx.batches]).flatten(0, 1)
    normed = functional.layer_norm(inputs, (8,), old["norm.weight"], old["norm.bias"])
    hidden = functional.relu(functional.linear(normed, old["first.weight"], old["first.bias"]))
    s1 = (normed.abs().amax(0) / old["first.weight"].abs().amax(0)).sqrt()
    s2 = (hidden.abs().amax(0) / old["second.weight"].abs().amax(0)).sqrt()
    s2[hidden.amax(0) == 0] = 1.0
    result = SmoothQuant().run(gm, ctx)
    new = weights_of(gm)
    expected = {
        "norm.weight": old["norm.weight"] / s1,
        "norm.bias": old["norm.bias"] / s1,
        "first.weight": old["first.weight"] * s1 / s2[:, None],
        "first.bias": old["first.bias"] / s2,
        "second.weight": old["second.weight"] * s2,
        "second.bias": old["second.bias"],
    }
    for name, tensor in expected.items():
        assert torch.allclose(new[name], tensor, rtol=1e-5, atol=1e-7), name
    first, second = table(result)
    assert (first["site"], first["kind"], first["channels"]) == (
        "norm:layer_norm", "norm_linear", 8,
    )  # fmt: skip
    assert first["max"] == pytest.approx(s1.max().item(), rel=1e-5)
    assert second["largest_before"] == pytest.approx(hidden.max().item(), rel=1e-5)
    assert second["largest_after"] == pytest.approx((hidden / s2).max().item(), rel=1e-5)
    assert result.changed == 2


def test_grouped_heads_share_the_largest_activation() -> None:
    _, gm, ctx = language_model("llama")
    before = clone(gm)
    result = SmoothQuant(sites=("value_output",)).run(gm, ctx)
    seen = torch.zeros(32, dtype=torch.float64)
    linear = find_label(before, "model.layers.0.self_attn.o_proj:linear")
    for batch in ctx.batches:
        value = values(before, batch, [linear.args[0]])[linear.args[0]]
        seen = torch.maximum(seen, value.abs().flatten(0, 1).amax(0))
    tied = seen.view(2, 2, 8).amax(1).flatten()  # [kv head, query head of its group, channel]
    weight = get_tensor(before, "model.layers.0.self_attn.o_proj.weight").abs().amax(0)
    scale = smoothing_scale(tied, weight.view(2, 2, 8).amax(1).flatten(), 0.5)
    row = table(result)[0]
    assert row["min"] == pytest.approx(scale.min().item())
    assert row["max"] == pytest.approx(scale.max().item())
    assert row["largest_before"] == pytest.approx(seen.max().item())


def test_each_weight_is_rounded_once() -> None:
    """In bfloat16: the float64 product of all factors, rounded, and nothing in between."""
    gm, ctx = chain(dtype=torch.bfloat16)
    old = weights_of(gm)["first.weight"].double()
    SmoothQuant().run(gm, ctx)
    rows = weights_of(gm)["first.weight"].double() / old
    assert weights_of(gm)["first.weight"].dtype == torch.bfloat16
    # rank one up to one rounding: log(rows) = a_i + b_j
    logs = rows.abs().log2()
    residual = logs - logs.mean(0) - logs.mean(1, keepdim=True) + logs.mean()
    assert residual.abs().max() < 2 * 2**-8


# --- the function stays the same ----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85])
def test_logits_stay_the_same(name: str, alpha: float) -> None:
    model, gm, ctx = language_model(name)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    probe = lm_batch(ctx.interface, 6, seed=3)
    before = run(gm, probe)
    result = SmoothQuant(alpha=alpha).run(gm, ctx)
    assert result.changed >= 6
    after = run(gm, probe)
    assert_equal(before[0], after[0])
    more = lm_batch(ctx.interface, 2, seed=4)
    more["attention_mask"] = torch.ones(2, 1, 2, 8, dtype=torch.bool).tril(6)
    more["position_ids"] = torch.arange(6, 8).expand(2, 2)
    names = ctx.interface.inputs[4:]
    untouched = _traced(name)[1]
    then = [
        run(graph, {**more, **dict(zip(names, cache[1:], strict=True))})[0]
        for graph, cache in ((untouched, before), (gm, after))
    ]
    assert_equal(*then)
    for key, parameter in model.named_parameters():  # the caller's model is never changed
        assert torch.equal(parameter, parameters[key])


@pytest.mark.parametrize("name", MODELS)
def test_regions_are_closed(name: str) -> None:
    """Each region's outputs are the same function of its inputs, with a fresh cache."""
    _, gm, ctx = language_model(name)
    before = clone(gm)
    result = SmoothQuant().run(gm, ctx)
    assert result.sites
    generator = torch.Generator().manual_seed(0)
    for site in result.sites:
        values: list[dict[str, Tensor]] = []
        probe: dict[str, Tensor] = {}
        for graph in (before, gm):
            values.append(_evaluate(graph, site.inputs, site.outputs, probe, generator))
        for name_of_output, expected in values[0].items():
            assert_equal(expected, values[1][name_of_output])


SIZES = {"batch": 2, "seq": 6, "past": 0, "kept": 6}


def _evaluate(
    gm: fx.GraphModule,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    probe: dict[str, Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    symbols = {symbol: SIZES[name] for symbol, name in gm.meta["symbol_names"].items()}

    def size(value: int | torch.SymInt) -> int:
        return int(value.node.expr.subs(symbols)) if isinstance(value, torch.SymInt) else value

    environment: dict[fx.Node, object] = {}
    wanted: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        value, name = node.meta.get("val"), meta_of(node).label
        if isinstance(value, torch.SymInt):
            environment[node] = size(value)
        elif name in inputs and node.op != "get_attr":
            if name not in probe:
                shape = [size(s) for s in value.shape]
                probe[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
                if value.dtype == torch.bool:
                    probe[name] = torch.ones(shape, dtype=torch.bool)
            environment[node] = probe[name]
        elif node.op == "get_attr":
            environment[node] = get_tensor(gm, str(node.target))
        elif node.op == "call_function" and all(n in environment for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: environment[n])
            environment[node] = node.target(*args, **kwargs)
        if name in outputs:
            wanted[name] = environment[node]  # type: ignore[assignment]
    assert set(wanted) == set(outputs)
    return wanted


# --- what is left alone -------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["FLOAT", "W8A16", "W4A16"])
def test_float_activations_are_left_alone(scheme: str) -> None:
    gm, ctx = chain(scheme)
    old = weights_of(gm)
    result = SmoothQuant().run(gm, ctx)
    assert result.changed == 0 and not result.sites and not result.tables
    assert all(old[name] is tensor for name, tensor in weights_of(gm).items())
    assert any("its input stays float" in skip.reason for skip in result.skipped)


def test_a_site_with_one_float_reader_is_left_alone() -> None:
    _, gm, ctx = language_model("llama")
    for node in gm.graph.nodes:
        if meta_of(node).label == "model.layers.1.mlp.down_proj:linear":
            annotate(node, scheme=SCHEMES["FLOAT"])
    result = SmoothQuant().run(gm, ctx)
    sites = [row["site"] for row in table(result)]
    assert "model.layers.0.mlp.up_proj:linear" in sites
    assert "model.layers.1.mlp.up_proj:linear" not in sites
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert reasons["model.layers.1.mlp.up_proj:linear"] == (
        "model.layers.1.mlp.down_proj:linear is FLOAT: its input stays float"
    )
    assert "is FLOAT" in reasons["model.norm:rms_norm"]  # lm_head gives the logits


def test_only_selected_kinds_are_smoothed() -> None:
    _, gm, ctx = language_model("llama")
    result = SmoothQuant(sites=("norm_linear",)).run(gm, ctx)
    assert {row["kind"] for row in table(result)} == {"norm_linear"}
    assert result.changed == 4
    assert any(skip.reason == "sites of kind up_down are not selected" for skip in result.skipped)


def test_an_alpha_per_kind() -> None:
    graphs = [language_model("llama")[1] for _ in range(3)]
    ctx = _traced("llama")[2]
    plain, strong, mixed = (
        table(step.run(gm, ctx))
        for gm, step in zip(
            graphs,
            (
                SmoothQuant(),
                SmoothQuant(alpha=0.8),
                SmoothQuant(alphas=(("norm_linear", 0.8),)),
            ),
            strict=True,
        )
    )
    assert mixed[0] == strong[0] != plain[0]
    assert [row["kind"] for row in mixed] == [row["kind"] for row in plain]


# --- bad input ----------------------------------------------------------------------------------


def test_wrong_options() -> None:
    for alpha in (-0.1, 1.01, float("nan")):
        with pytest.raises(RecipeError, match="alpha"):
            SmoothQuant(alpha=alpha)
        with pytest.raises(RecipeError, match="alpha"):
            SmoothQuant(alphas=(("up_down", alpha),))
    with pytest.raises(RecipeError, match="alpha is serach"):
        SmoothQuant(alpha="serach")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="did you mean norm_linear"):
        SmoothQuant(sites=("norm_linaer",))
    with pytest.raises(RecipeError, match="unknown kind"):
        SmoothQuant(alphas=(("everything", 0.5),))
    assert SmoothQuant().sites == KINDS


def test_activations_that_are_not_finite() -> None:
    gm, ctx = chain()
    next(iter(ctx.batches[1].values()))[0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="norm:layer_norm"):
        SmoothQuant().run(gm, ctx)


@pytest.mark.parametrize("name", ["norm.weight", "first.weight", "second.weight"])
def test_weights_that_are_not_finite(name: str) -> None:
    gm, ctx = chain()
    get_tensor(gm, name).view(-1)[3] = float("inf")
    with pytest.raises(NumericsError, match=name):
        SmoothQuant().run(gm, ctx)


def test_no_calibration_tokens() -> None:
    gm, ctx = chain()
    with pytest.raises(InputError, match="no calibration tokens"):
        SmoothQuant().run(gm, replace(ctx, batches=()))


def test_a_weight_that_would_overflow() -> None:
    gm, ctx = chain(dtype=torch.float16)
    with torch.no_grad():
        get_tensor(gm, "norm.weight").fill_(2e3)
        get_tensor(gm, "first.weight").fill_(5e3)  # s = 1 / 5e3 at alpha 0
    with pytest.raises(NumericsError, match=r"weight norm\.weight overflows torch\.float16"):
        SmoothQuant(alpha=0.0, sites=("norm_linear",)).run(gm, ctx)


# --- alpha: search ------------------------------------------------------------------------------


class OutlierNorm(nn.Module):
    """norm ─► linear, with two channels 40 times larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.RMSNorm(32, eps=1e-6), nn.Linear(32, 24, bias=False)
        with torch.no_grad():
            self.norm.weight[::16] = 40.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def outlier_norm(scheme: str) -> tuple[fx.GraphModule, PassContext]:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(4, 30, 32, generator=generator) for _ in range(2)]
    gm, ctx = prepared(*trace_module(OutlierNorm().eval(), (batches[0],)), scheme)
    return gm, replace(ctx, batches=[{ctx.interface.inputs[0]: batch} for batch in batches])


def naive_error(gm: fx.GraphModule, y: Tensor, scale: Tensor) -> float:
    """Noise over signal of the quantized linear behind the norm, token by token, W8A8_DYNAMIC."""
    weight = get_tensor(gm, "linear.weight")
    scaled = weight * scale.float()
    step = scaled.abs().amax(1, keepdim=True) / 127
    stored = (scaled / step).round() * step
    noise = signal = 0.0
    for token in y:
        x = token / scale.float()
        unit = x.abs().max() / 127
        x = (x / unit).round() * unit
        noise += float((stored @ x - weight @ token).double().square().sum())
        signal += float((weight @ token).double().square().sum())
    return noise / signal


def test_the_search_finds_what_brute_force_finds() -> None:
    gm, ctx = outlier_norm("W8A8_DYNAMIC")
    before = clone(gm)
    row = table(SmoothQuant(alpha="search").run(gm, ctx))[0]
    x = torch.cat([next(iter(batch.values())) for batch in ctx.batches]).flatten(0, 1)
    y = functional.rms_norm(x, (32,), get_tensor(before, "norm.weight"), eps=1e-6)
    weight = get_tensor(before, "linear.weight")
    sizes = {
        "amax": (y.abs().amax(0), weight.abs().amax(0)),
        "rms": (y.square().mean(0).sqrt(), weight.square().mean(0).sqrt()),
    }
    errors = {
        (statistic, step / 10): naive_error(before, y, smoothing_scale(*size, step / 10))
        for statistic, size in sizes.items()
        for step in range(11)
    }
    coarse = min(errors, key=errors.__getitem__)
    for near in (coarse[1] - 0.05, coarse[1] + 0.05):
        if 0 <= near <= 1:
            scale = smoothing_scale(*sizes[coarse[0]], near)
            errors[coarse[0], near] = naive_error(before, y, scale)
    best = min(errors, key=errors.__getitem__)
    assert (row["statistic"], row["alpha"]) == (best[0], pytest.approx(best[1]))
    plain = naive_error(before, y, torch.ones(32))
    decibels = [-10 * math.log10(error) for error in (plain, errors[best])]
    assert [row["db_before"], row["db_after"]] == pytest.approx(decibels, abs=0.02)
    assert decibels[1] > decibels[0] + 6


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W4A8-g32"])
def test_no_site_gets_worse(scheme: str) -> None:
    gm, ctx = outlier_norm(scheme)
    old = weights_of(gm)
    result = SmoothQuant(alpha="search").run(gm, ctx)
    assert result.changed == 1
    assert table(result)[0]["db_after"] > table(result)[0]["db_before"]
    for name, weight in weights_of(gm).items():
        assert not torch.equal(weight, old[name])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_stay_the_same_under_the_search(name: str) -> None:
    _, gm, ctx = language_model(name)
    probe = lm_batch(ctx.interface, 6, seed=3)
    before = run(gm, probe)
    result = SmoothQuant(alpha="search").run(gm, ctx)
    left_alone = [skip for skip in result.skipped if "no alpha lowers" in skip.reason]
    assert result.changed + len(left_alone) >= 6 and result.changed > 0
    assert_equal(before[0], run(gm, probe)[0])
    again = language_model(name)[1]
    SmoothQuant(alpha="search").run(again, ctx)
    for key, weight in weights_of(gm).items():  # the sample is seeded
        assert torch.equal(weight, get_tensor(again, key))


def test_a_site_that_no_alpha_helps_is_left_alone() -> None:
    gm, ctx = outlier_norm("W8A8")
    get_tensor(gm, "linear.weight").zero_()
    result = SmoothQuant(alpha="search").run(gm, ctx)
    assert result.changed == 0 and not result.sites
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert reasons["norm:rms_norm"] == "no alpha lowers the error of the matmuls behind it"


def test_a_kind_with_an_alpha_of_its_own_is_not_searched() -> None:
    gm, ctx = outlier_norm("W8A8")
    fixed, _ = outlier_norm("W8A8")
    row = table(SmoothQuant(alpha="search", alphas=(("norm_linear", 0.3),)).run(gm, ctx))[0]
    assert (row["statistic"], row["alpha"], row["db_after"]) == ("amax", 0.3, "")
    SmoothQuant(alpha=0.3).run(fixed, ctx)
    assert torch.equal(get_tensor(gm, "norm.weight"), get_tensor(fixed, "norm.weight"))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_one_token_and_a_dead_channel(scheme: str) -> None:
    gm, ctx = outlier_norm(scheme)
    get_tensor(gm, "norm.weight")[5] = 0.0
    name = ctx.interface.inputs[0]
    few = replace(ctx, batches=[{name: next(iter(ctx.batches[0].values()))[:1, :1]}])
    expected = run(gm, few.batches[0])[0]
    SmoothQuant(alpha="search").run(gm, few)
    assert torch.allclose(run(gm, few.batches[0])[0], expected, rtol=1e-4, atol=1e-4)
