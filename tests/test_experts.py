"""A mixture of experts from model to compiled model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

import panguq
from panguq.errors import InputError, NumericsError, RecipeError, TraceError
from panguq.ir.analysis.channels import find_scale_sites
from panguq.ir.edit import module_path
from panguq.ir.node_meta import scheme_of
from panguq.ir.views import ExpertLinear
from panguq.passes.codes import expert_solver, gram
from panguq.passes.pipeline.base import matmuls
from panguq.tensors import nameless, spill
from tests.families.models import make
from tests.families.sweep import CALIBRATION, IDS
from tests.shared_traces import shared_traces


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    with shared_traces():
        yield make("qwen3_moe")


def test_the_graph_shows_one_matmul_of_all_experts(model) -> None:
    compiled = panguq.compile(model, "float")
    nodes = [n for n in matmuls(compiled.graph) if ExpertLinear.match(n) is not None]
    names = [f"model.layers.{i}.mlp.experts.{w}_proj" for i in (0, 1) for w in ("gate_up", "down")]
    assert [module_path(n) for n in nodes] == names
    assert [(ExpertLinear.of(n).experts, *ExpertLinear.of(n).shape) for n in nodes] == [
        (4, 128, 128), (4, 128, 64),
    ] * 2  # fmt: skip


def test_routers_stay_float_and_the_report_says_why(model) -> None:
    compiled = panguq.compile(model, "w8a8-dynamic", calibration=CALIBRATION)
    schemes = {module_path(n): scheme_of(n).name for n in matmuls(compiled.graph)}
    assert {schemes[f"model.layers.{i}.mlp.gate"] for i in (0, 1)} == {"FLOAT"}
    (said,) = (w for w in compiled.report.warnings if "a choice follows" in w)
    assert "model.layers.*.mlp.gate (2)" in said and "topk" in said


def test_every_matmul_of_every_expert_has_a_row(model) -> None:
    compiled = panguq.compile(model, "w4a16", calibration=CALIBRATION)
    rows = {row.name: row for row in compiled.report.matmuls}
    one = rows["model.layers.1.mlp.experts.3.down_proj:linear"]
    assert (one.n, one.k, one.scheme, one.group_size) == (128, 64, "W4A16", 64)
    assert one.kernel == "panguq_cpu.expert_int4_linear"
    assert one.stored_bytes == 128 * 64 // 2 + 2 * 128  # half a byte a weight, bfloat16 scales
    tokens = [rows[f"model.layers.1.mlp.experts.{e}.down_proj:linear"].tokens for e in range(4)]
    assert sum(tokens) == 2 * sum(ids.numel() for ids in CALIBRATION)  # two experts a token
    assert all(rows[f"model.layers.0.mlp.experts.{e}.gate_up_proj:linear"] for e in range(4))
    assert one.on_all_tokens
    assert sum("were calibrated on all tokens" in said for said in compiled.report.warnings) == 1
    floats = sum(r.n * r.k for r in compiled.report.matmuls if r.scheme == "FLOAT")
    whole = sum(r.n * r.k for r in compiled.report.matmuls)
    assert compiled.report.quantized_share == 1 - floats / whole


def test_few_tokens_are_followed_where_the_recipe_says_so(model) -> None:
    follows = {
        "name": "router",
        "schemes": {"*": "W4A16"},
        "passes": [{"calibrate": {"least_tokens": 0}}, "insert-fake-quant", "quantize-weights"],
    }
    compiled = panguq.compile(model, follows, calibration=CALIBRATION)
    assert not any(row.on_all_tokens for row in compiled.report.matmuls)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a16-asym"])
def test_saved_and_loaded_it_gives_the_same_bits(model, recipe, tmp_path) -> None:
    compiled = panguq.compile(model, recipe, calibration=CALIBRATION)
    assert compiled.report.logits_sqnr_db > 10
    compiled.save(tmp_path / "saved")
    loaded = panguq.load(tmp_path / "saved")
    assert torch.equal(loaded(IDS).logits, compiled(IDS).logits)


def test_weights_that_are_stored_transposed_and_their_biases_are_quantized() -> None:
    compiled = panguq.compile(make("gpt_oss"), "w8a8-dynamic", calibration=CALIBRATION)
    assert compiled.report.quantized_share > 0.9
    assert compiled.report.logits_sqnr_db > 15


def test_norm_experts_router_and_shared_expert_are_one_site() -> None:
    compiled = panguq.compile(make("qwen2_moe"), "float")
    found, _ = find_scale_sites(compiled.graph, compiled.interface)
    (site,) = (s for s in found if s.name.startswith("model.layers.1.post_attention_layernorm"))
    read = {module_path(c.linear).removeprefix("model.layers.1.mlp.") for c in site.consumers}
    shared = {"shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert_gate"}
    assert read == {"gate", "experts.gate_up_proj", *shared}


@pytest.mark.parametrize("recipe", ["w4a16-awq", "w4a16-gptq", "w4a16-rounding"])
def test_better_than_rounding_to_nearest(model, recipe) -> None:
    plain = {"schemes": {"*": "W4A16"}, "passes": ["insert-fake-quant", "quantize-weights"]}
    nearest, better = (
        panguq.compile(model, r, calibration=CALIBRATION).report.logits_sqnr_db
        for r in (plain, recipe)
    )
    assert better > nearest + 1


@pytest.fixture(scope="module")
def gptq_codes(model) -> dict[str, Tensor]:
    return panguq.compile(model, "w4a16-gptq", calibration=CALIBRATION).state_dict()


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (expert_solver, "EXPERTS_AT_ONCE", 1),
        (expert_solver, "EXPERTS_AT_ONCE", 3),
        (nameless, "LARGE_BYTES", 1),  # all that is computed of weights lies in files
        (spill, "SPILL_BYTES", 1),  # and so do the rows of experts that are shown all tokens
    ],
)
def test_how_many_experts_are_held_changes_no_bit(
    model, gptq_codes, owner, name, value, monkeypatch
) -> None:
    monkeypatch.setattr(owner, name, value)
    found = panguq.compile(model, "w4a16-gptq", calibration=CALIBRATION).state_dict()
    assert found.keys() == gptq_codes.keys()
    assert all(torch.equal(tensor, gptq_codes[key]) for key, tensor in found.items())


def test_what_all_tokens_say_is_computed_once(model, monkeypatch) -> None:
    """Four experts that see all tokens: one matrix for the gate and up projections of all of them,
    and one for each expert's down projection, which reads what its own gate and up gave."""
    factored = []
    plain = gram.inverse_factor

    def counted(hessian: Tensor, *args: object) -> gram.InverseFactor:
        factored.append(tuple(hessian.shape))
        return plain(hessian, *args)

    monkeypatch.setattr(gram, "inverse_factor", counted)
    recipe = {
        "name": "experts",
        "schemes": {"*": "FLOAT", "*.experts.*": "W4A16"},
        "passes": ["insert-fake-quant", "gptq"],
    }
    panguq.compile(model, recipe, calibration=CALIBRATION)
    assert factored == [(128, 128), *[(64, 64)] * 4] * 2


def test_a_method_that_cannot_stack_its_solutions_says_so(model) -> None:
    with pytest.raises(RecipeError, match=r"slim-llm does not choose the codes of experts: model"):
        panguq.compile(model, "w2a16-slim-llm", calibration=CALIBRATION)


def test_a_router_whose_weights_overflow_is_named(model) -> None:
    other = make("qwen3_moe")
    with torch.no_grad():
        other.model.layers[1].mlp.gate.weight[0] = 3e38
    with pytest.raises((NumericsError, TraceError)) as caught:
        panguq.compile(other, "w4a16", calibration=CALIBRATION)
    assert "layers.1.mlp" in caught.value.message


class Loop(nn.Module):
    """Experts of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x) + self.experts[1](x)


class Routed(nn.Module):
    """A mixture of experts as it was once written: for each, the rows that it is to have."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.router = nn.Linear(128, 4, bias=False)
        self.parts = nn.ModuleList(nn.Linear(128, 128) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 128)
        weights, chosen = self.router(rows).softmax(-1).topk(2, -1)
        total = torch.zeros_like(rows)
        for expert, part in enumerate(self.parts):
            token, place = torch.where(chosen == expert)
            if self.how == "masks":
                mask = (chosen == expert).any(-1)
                total[mask] += part(rows[mask])
            elif self.how == "picks" or len(token):
                total.index_add_(0, token, part(rows[token]) * weights[token, place, None])
        return total.view(x.shape)


@pytest.mark.parametrize("how", ["picks", "branches", "masks"])
def test_a_loop_over_experts_is_one_sentence(how: str) -> None:
    said = r"module {} \(Routed\) loops over its list 'parts' and picks the rows"
    other = make("qwen3_moe")
    other.model.layers[1].mlp = Routed(how)
    with pytest.raises(TraceError, match=said.format(r"model\.layers\.1\.mlp")):
        panguq.compile(other, "float")
    plain = nn.Sequential(nn.Linear(128, 128), Routed(how)).eval()
    with pytest.raises(TraceError, match=said.format("1")):
        panguq.compile(plain, "float", example_inputs=(torch.randn(6, 128),))


def test_experts_of_an_unknown_kind_are_refused_by_name(model) -> None:
    other = make("qwen3_moe")
    other.model.layers[1].mlp = Loop()
    for command in (panguq.compile, panguq.plan):
        with pytest.raises(TraceError, match=r"model\.layers\.1\.mlp\.experts \(ModuleList\)"):
            command(other, "float")


def test_more_experts_are_asked_for_than_there_are(model) -> None:
    other = make("qwen3_moe")
    other.config.num_experts_per_tok = 5
    with pytest.raises(TraceError, match="has 4 experts, and 5 of them are asked for"):
        panguq.compile(other, "float")


def test_weights_of_all_experts_one_below_the_other_are_quantized(tmp_path) -> None:
    """DBRX stores `[experts * n, k]`, and the last of its three weights transposed."""
    config = transformers.DbrxConfig(
        d_model=64, n_heads=4, n_layers=1, max_seq_len=128, vocab_size=256,
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DbrxForCausalLM(config).eval()
    compiled = panguq.compile(model, "w8a8-dynamic", calibration=CALIBRATION)
    named = {row.name for row in compiled.report.matmuls if row.scheme == "W8A8_DYNAMIC"}
    experts = "transformer.blocks.0.ffn.experts.mlp"
    assert {f"{experts}.3.{w}:linear" for w in ("w1", "v1", "w2")} <= named
    assert compiled.report.logits_sqnr_db > 25
    compiled.save(tmp_path / "saved")
    assert torch.equal(panguq.load(tmp_path / "saved")(IDS).logits, compiled(IDS).logits)


def test_an_expert_that_no_token_reaches_is_counted(model) -> None:
    other = make("qwen3_moe")
    with torch.no_grad():
        gate = other.model.layers[1].mlp.gate.weight
        gate.copy_(gate[:1].expand_as(gate))  # all experts are as good, and two are always taken
    compiled = panguq.compile(other, "w4a16", calibration=CALIBRATION)
    rows = {row.name: row for row in compiled.report.matmuls}
    tokens = [rows[f"model.layers.1.mlp.experts.{e}.down_proj:linear"].tokens for e in range(4)]
    none = 2 * tokens.count(0)  # gate_up_proj and down_proj
    assert none > 0
    (said,) = [text for text in compiled.report.warnings if "calibrated on all tokens" in text]
    assert f"{none} of them none" in said


def test_an_id_that_is_no_expert_is_one_sentence() -> None:
    with pytest.raises(InputError, match="a token is routed to expert 4 of 4") as caught:
        torch.ops.panguq.route_tokens(torch.tensor([[0, 4]]), 4)
    assert "routing weights that are not finite" in caught.value.hint
