"""openPangu's mixtures of experts: what their layers compute, and their way to a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import panguq
from panguq.check.report import check_folder
from panguq.errors import InputError
from panguq.models.architectures import config_classes, model_class
from panguq.models.hf import load_pretrained
from panguq.models.openpangu.mixture_layers import GroupedMixture, ScoredMixture, SinkAttention
from tests.model_shelf import token_ids
from tests.shared_traces import shared_traces

SHARED: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_experts_per_tok=2, vocab_size=96, max_position_embeddings=256,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, rms_norm_eps=1e-6,
)  # fmt: skip
LATENT: dict[str, Any] = dict(
    n_routed_experts=16, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, num_nextn_predict_layers=0,
)  # fmt: skip
PRO: dict[str, Any] = dict(
    num_experts=16, shared_expert_intermediate_size=64, num_key_value_heads=2
)
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Pro MoE": ("PanguProMoE", "PanguProMoEForCausalLM", PRO),
    "R-72B": (
        "PanguProMoE",
        "PanguProMoEV2ForCausalLM",
        dict(
            PRO, qk_nope_dim=16, qk_rope_dim=8, v_channels=16, param_sink_number=4,
            param_sink_with_value=True, mlp_only_layers=[0], sandwich_norm=True,
            router_enable_expert_bias=True, attention_bias=False, routed_scaling_factor=2.5,
        ),
    ),
    "Ultra MoE": ("pangu_ultra_moe", "PanguUltraMoEForCausalLM", LATENT),
    "2.0, its known part": (
        "openpangu_v2",
        "OpenPanguV2ForCausalLM",
        dict(
            LATENT, param_sink_number=4, swa_layers=[1], sliding_window_list=[8], use_mhc=False,
            use_mome=False, index_topk=None,
        ),
    ),
}  # fmt: skip
CALIBRATION = [token_ids(1, 32, seed) for seed in range(4)]
PADDING = 3


def make_mixture(name: str, **changed: Any) -> Any:
    """A tiny model of the kind, with every weight shaken."""
    model_type, architecture, sizes = MIXTURES[name]
    settings = SHARED | sizes | changed
    config = config_classes()[model_type](**settings, architectures=[architecture])
    torch.manual_seed(0)
    model = model_class(config)[0](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module", params=MIXTURES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """As it is loaded from a folder of the published names."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    make_mixture(request.param).save_pretrained(folder)
    with shared_traces():
        yield load_pretrained(folder)


# --- compiled, quantized, saved -----------------------------------------------------------------


def test_the_compiled_model_is_the_eager_one(model: Any) -> None:
    compiled = panguq.compile(model, "float")
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    wanted = model(ids, attention_mask=mask).logits
    found = compiled(ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.allclose(found[real], wanted[real], atol=1e-5 * wanted.detach().abs().max().item())
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}  # from the cache
    assert torch.equal(compiled.generate(ids, **given), model.generate(ids, **given))


def test_it_goes_to_servers_with_float_routers(model: Any, tmp_path: Path) -> None:
    compiled = panguq.compile(
        model, "w8a8-dynamic-serving", calibration=CALIBRATION, dtype=torch.bfloat16
    )
    assert compiled.report.quantized_share > 0.95
    assert compiled.report.logits_sqnr_db > 15
    schemes = {row.name: row.scheme for row in compiled.report.matmuls}
    assert {s for name, s in schemes.items() if name.endswith("mlp.gate:linear")} <= {"FLOAT"}
    published = load_file(Path(model.name_or_path) / "model.safetensors").keys()
    for form in ("ascend", "compressed-tensors"):
        compiled.save(tmp_path / form, format=form)
        (file,) = (tmp_path / form).glob("*.safetensors")
        stored = load_file(file)
        assert stored.keys() >= published
        assert stored["model.layers.1.mlp.gate.weight"].is_floating_point()
        assert stored["model.layers.1.mlp.experts.7.up_proj.weight"].dtype == torch.int8
        report = check_folder(tmp_path / form)
        assert {f.rule for f in report.findings if f.breaks} == {"no-class"}, report.render()
        assert report.servers["mindie" if form == "ascend" else "transformers"] == "refuses"
        (name,) = model.config.architectures
        in_vllm = name in ("PanguProMoEV2ForCausalLM", "PanguUltraMoEForCausalLM")
        assert report.servers["vllm-ascend"] == ("takes" if in_vllm else "refuses")
        config = json.loads((tmp_path / form / "config.json").read_text())
        assert config["architectures"] == model.config.architectures


def test_four_bits(model: Any) -> None:
    compiled = panguq.compile(model, "w4a16", calibration=CALIBRATION)
    assert compiled.report.quantized_share > 0.95
    assert compiled.report.logits_sqnr_db > 5


# --- what the layers compute --------------------------------------------------------------------


def test_ultra_is_deepseek_v3_but_for_its_norms() -> None:
    ours = make_mixture("Ultra MoE", sandwich_norm=False, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4,
    })  # fmt: skip
    config = transformers.DeepseekV3Config(
        **SHARED, **LATENT, n_group=1, topk_group=1, rope_parameters=ours.config.rope_parameters
    )
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    ids = token_ids(2, 20)
    with torch.no_grad():
        found, wanted = ours(ids).logits, theirs(ids).logits
    assert torch.allclose(found, wanted, atol=1e-5 * wanted.detach().abs().max().item())


def test_pro_takes_the_best_expert_of_each_group() -> None:
    block = make_mixture("Pro MoE").model.layers[0].mlp
    assert isinstance(block, GroupedMixture)
    x = torch.randn(5, 64)
    scores = (x @ block.gate.weight.T).softmax(-1)
    for token in range(5):
        wanted = block.shared_expert(x[token])
        for group in range(2):
            expert = 8 * group + int(scores[token, 8 * group : 8 * group + 8].argmax())
            weight = scores[token, expert] * block.router_scale[0, expert]
            wanted = wanted + weight * _expert(block, expert, x[token])
        assert torch.allclose(block(x[None])[0, token], wanted, atol=1e-5)


def test_a_routers_bias_moves_the_choice_and_no_weight() -> None:
    block = make_mixture("R-72B").model.layers[1].mlp
    assert isinstance(block, ScoredMixture)
    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        block.e_score_correction_bias.zero_()
        block.e_score_correction_bias[[2, 5]] = 10.0
    scores = (x[0, 0] @ block.gate.weight.T).sigmoid()[[2, 5]]
    weights = 2.5 * scores / scores.sum()
    wanted = block.shared_experts(x[0, 0])
    for weight, expert in zip(weights, (2, 5), strict=True):
        wanted = wanted + weight * _expert(block, expert, x[0, 0])
    assert torch.allclose(block(x)[0, 0], wanted, atol=1e-5)


def _expert(block: Any, expert: int, x: Tensor) -> Tensor:
    gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
    return block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)


def test_sinks_are_keys_that_every_query_sees() -> None:
    model = make_mixture("R-72B")
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, SinkAttention)
    x = torch.randn(1, 1, 64)  # one token at position 0, which no rotary position turns
    query, key, value = attention.qkv_proj(x)[0, 0].split(attention.sizes)
    query, key = query.view(4, 24), attention.k_layernorm(key.view(2, 24))
    keys = torch.cat([attention.k_layernorm(attention.param_sink_key), key[None]])
    values = torch.cat([attention.param_sink_value, value.view(1, 2, 16)])
    mixed = []
    for head in range(4):
        scores = keys[:, head // 2] @ query[head] / 24**0.5
        mixed.append(scores.softmax(0) @ values[:, head // 2])
    rotary = model.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
    found = attention(x, rotary, torch.ones(1, 1, 1, 5, dtype=torch.bool), None)
    assert torch.allclose(found[0, 0], attention.o_proj(torch.cat(mixed)), atol=1e-5)


def test_a_sliding_window_hides_what_lies_before_it() -> None:
    model = make_mixture("2.0, its known part", swa_layers=[0, 1], sliding_window_list=[4, 4])
    ids = token_ids(1, 16)
    other = ids.clone()
    other[0, 0] = 95 if ids[0, 0] != 95 else 94
    with torch.no_grad():
        one, two = model(ids).logits, model(other).logits
    reach = 2 * (4 - 1)  # through two layers
    assert torch.equal(one[0, reach + 1 :], two[0, reach + 1 :])
    assert not torch.equal(one[0, reach], two[0, reach])


# --- what is known of a checkpoint --------------------------------------------------------------


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    make_mixture("Ultra MoE").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    behind = {
        n.replace(".1.", ".2.", 1): w.clone() for n, w in weights.items() if ".layers.1." in n
    }
    save_file(weights | behind, file, metadata={"format": "pt"})
    unused = load_pretrained(tmp_path).panguq_unused_weights
    assert "model.layers.2.self_attn.kv_b_proj.weight" in unused
    assert all(name.startswith("model.layers.2.") for name in unused)
    more = {"model.layers.1.noise.weight": torch.ones(3)}
    save_file(weights | more, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no place in openPangu's layers \(pangu_ultra_moe\)"):
        load_pretrained(tmp_path)


def test_the_words_of_ultras_first_release_mean_the_same() -> None:
    old = dict(
        num_routed_experts=16, num_dense_layers=1, attention_q_lora_dim=32, attention_v_dim=16,
        attention_kv_lora_dim=32, attention_qk_dim=16, attention_qk_rope_dim=8, num_mtp_layers=0,
    )  # fmt: skip
    kind = config_classes()["pangu_ultra_moe"]
    assert kind(**SHARED, **old).to_dict() == kind(**SHARED, **LATENT).to_dict()


def test_pieces_of_2_0_are_counted_and_named_and_never_left_out_of_a_model(tmp_path: Path) -> None:
    whole = {"use_mhc": True, "use_mome": True, "index_topk": 8, "dsa_layers": [0]}
    model = make_mixture("2.0, its known part", **whole)
    model.save_pretrained(tmp_path)
    plan = panguq.plan(tmp_path, "w8a8-dynamic")
    pieces = {
        "the mixing of residual streams (mHC)": 2 * 2 * 256 * (24 + 1) + 256 * 5,
        "the indexer of sparse attention (DSA)": 32 * 128 * 32 + (128 + 32) * 64,
        "convolutions on latents and after attention (MoME)": 2 * (64 + 32 + 32) * 3,
    }
    assert plan.only_counted == pieces
    counted = sum(pieces.values())
    frequencies = model.model.rotary_emb.inv_freq.numel()
    known = sum(p.numel() for p in model.parameters()) + frequencies
    assert plan.weight_bytes == 4 * (known + counted)
    linear = sum(row.n * row.k * row.experts for row in plan.matmuls)
    floats = sum(row.n * row.k for row in plan.matmuls if row.scheme == "FLOAT")
    assert plan.shares["FLOAT"] == pytest.approx((floats + counted) / (linear + counted))
    assert "as float, in millions of weights: the mixing of residual streams" in plan.render()
    with pytest.raises(InputError, match=r"pieces that panguq has no module for: the mixing of"):
        load_pretrained(tmp_path)
