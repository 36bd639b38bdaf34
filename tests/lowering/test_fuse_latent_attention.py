"""Latent attention in lowered graphs: found by data flow, equal to what it replaces, and saved."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import panguq
from panguq import compiler
from panguq.data.inputs import empty_past, prepare, takes_empty_mask
from panguq.errors import NumericsError
from panguq.ir.canonical_views import LatentAttention as Fused
from panguq.ir.edit import clone, label, op_name
from panguq.ir.interface import Interface
from panguq.ir.ops import latent_attention as latent_ops
from panguq.ir.ops.opset import body_of
from panguq.ir.properties import TRACED, Property
from panguq.ir.run.interpret import run
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.lowering.fuse_latent_attention import FuseLatentAttention
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.lowering.run.prepack import prepack
from panguq.lowering.run.write_into_cache import write_into_cache, written_into
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import PassContext, PassResult
from panguq.passes.pipeline.runner import PassRecord, Runner
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.tensors.weight_store import WeightStore
from tests.families.models import make
from tests.model_shelf import LatentAttention, latent_inputs, run_passes, trace_tiny

IDS = torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(3))
CANONICAL = TRACED | {Property.CANONICAL}


# --- what is found ------------------------------------------------------------------------------


def fuse(module: LatentAttention) -> tuple[fx.GraphModule, PassRecord]:
    gm, interface = trace_tiny(module, *latent_inputs(2, 3))
    runner = Runner(PassContext(interface, WeightStore()), held=CANONICAL)
    (record,) = runner.run(gm, [FuseLatentAttention()])
    return gm, record


def fused(gm: fx.GraphModule) -> list[Fused]:
    return [view for view in map(Fused.match, gm.graph.nodes) if view is not None]


def test_a_layer() -> None:
    module = LatentAttention()
    gm, record = fuse(module)
    (view,) = fused(gm)
    assert label(view.weight) == "kv_b.weight" and record.result.changed == 1
    assert record.proved_difference is not None and record.proved_difference < 1e-12
    for seq, total in ((2, 3), (1, 40), (5, 5)):
        given = latent_inputs(seq, total)
        torch.testing.assert_close(gm(*given)[0], module(*given), atol=1e-5, rtol=1e-5)


class ReadTwice(LatentAttention):
    def forward(self, query: Tensor, latent: Tensor, rope_key: Tensor) -> Any:
        keys, values = self.parts(latent.unsqueeze(1))
        broadcast = self.rope_proj(rope_key).unsqueeze(1).expand(-1, self.heads, -1, -1)
        key = torch.cat((keys, broadcast), dim=-1)
        attended = functional.scaled_dot_product_attention(query, key, values, scale=0.3)
        return attended, values


class Interleaved(LatentAttention):
    """The rows of the weight are all heads' keys and then all heads' values."""

    def parts(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [self.heads * self.nope, self.heads * self.value]
        keys, values = self.kv_b(latent).squeeze(1).split(sizes, dim=-1)
        shape = (*keys.shape[:2], self.heads, -1)
        return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)


class TwoLinears(LatentAttention):
    def parts(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().parts(latent)
        return keys + super().parts(2 * latent)[0], values


@pytest.mark.parametrize(
    "module, reason",
    [
        (LatentAttention(bias=True), "kv_b:linear has a bias"),
        (ReadTwice(), "kv_b:linear is also read by output"),
        (Interleaved(), "the rows of kv_b.weight are not each head's keys and then its values"),
        (TwoLinears(), "add is not moved there from one linear"),
    ],
)
def test_what_is_left_alone(module: LatentAttention, reason: str) -> None:
    gm, record = fuse(module)
    (skip,) = record.result.skipped
    assert (skip.node, skip.reason) == ("attention", reason) and not fused(gm)


class OwnKeys(LatentAttention):
    """Every head has a rotary key of its own: ordinary attention on keys of two parts."""

    def forward(self, query: Tensor, latent: Tensor, rope_key: Tensor) -> Tensor:
        keys, values = self.parts(latent.unsqueeze(1))
        own = keys[..., : self.rope] * self.rope_proj(rope_key).unsqueeze(1)
        key = torch.cat((keys, own), dim=-1)
        return functional.scaled_dot_product_attention(query, key, values, scale=0.3)


def test_other_attention_is_no_candidate() -> None:
    gm, record = fuse(OwnKeys())
    assert record.result == PassResult(tables=record.result.tables) and not fused(gm)


# --- in a language model ------------------------------------------------------------------------


@functools.cache
def tiny() -> nn.Module:
    model: nn.Module = make("deepseek_v3", num_hidden_layers=1)
    return model


@functools.cache
def traced() -> tuple[fx.GraphModule, Interface]:
    return trace_causal_lm(tiny())


def lowered(scheme: str, *, fuse: bool) -> tuple[fx.GraphModule, Interface]:
    """The graph that a CPU runs, with all matmuls but the logits' in this scheme."""
    gm, interface = clone(traced()[0]), traced()[1]
    ctx = PassContext(interface, WeightStore(), batches=[prepare(interface, IDS)])
    fuses = (FuseLatentAttention(),) if fuse else ()
    passes = (Calibrate(), InsertFakeQuant(), QuantizeWeights()) if scheme != "FLOAT" else ()
    run_passes(gm, ctx, scheme, *passes, *fuses, LowerMatmuls(precision="float32"))
    assert len(fused(gm)) == fuse
    return prepack(gm), interface


def decode(gm: fx.GraphModule, interface: Interface, steps: int) -> Tensor:
    """The logits of a prompt and of `steps` tokens behind it, one at a time."""
    past = empty_past(interface, len(IDS))
    prompt = IDS.shape[1] - steps
    found = []
    for ids in (IDS[:, :prompt], *IDS[:, prompt:].split(1, dim=1)):
        given = prepare(interface, ids, past=past, empty_mask=takes_empty_mask(gm))
        logits, *past = run(gm, given)
        found.append(logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("scheme", ["FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16-g32"])
def test_it_computes_what_it_replaces(scheme: str) -> None:
    plain, interface = lowered(scheme, fuse=False)
    rewritten, _ = lowered(scheme, fuse=True)
    assert takes_empty_mask(rewritten)
    expected = decode(plain, interface, steps=6)
    torch.testing.assert_close(
        decode(rewritten, interface, steps=6), expected, atol=1e-5, rtol=1e-5
    )


def test_the_weight_is_made_of_its_codes_once() -> None:
    """Steps read it in floating point; nothing dequantizes it at each of them."""
    gm, _ = lowered("W4A16-g32", fuse=True)
    (view,) = fused(gm)
    assert view.weight.op == "get_attr" and view.weight.meta["val"].dtype == torch.float32


def test_latents_are_written_into_the_cache() -> None:
    gm, interface = lowered("FLOAT", fuse=True)
    write_into_cache(gm, interface)
    assert written_into(gm) == {"past_key_0", "past_value_0"}


def test_the_proof_takes_the_form_that_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, scale=1.01 * scale)

    monkeypatch.setattr(latent_ops, "_with_one_key_head", wrong)
    with pytest.raises(NumericsError, match="self_attn:attention changed by"):
        lowered("FLOAT", fuse=True)


class Bodies(fx.Interpreter):
    """Runs the bodies of panguq's ops, into which PyTorch's counter does not see."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return body_of(target)(*args, **kwargs)


def test_a_token_in_the_past_costs_a_step_its_scores_alone() -> None:
    """And without the op its expansion, heads * (nope + v) * rank multiplications, on top."""
    batch, heads, nope, rope, value, rank = 2, 4, 32, 16, 32, 32
    more = {}
    for fuse in (True, False):
        gm, interface = lowered("FLOAT", fuse=fuse)
        flops = []
        for past in (64, 80):
            cached = [torch.zeros(batch, 1, past, size) for size in (rank, rope)]
            given = prepare(interface, IDS[:, :1], past=cached)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                Bodies(gm).run(*(given[name] for name in interface.inputs))
            flops.append(counter.get_total_flops())
        more[fuse] = (flops[1] - flops[0]) // (2 * batch * heads * 16)
    assert more[True] == 2 * rank + rope
    assert more[False] == (nope + value) * rank + (nope + rope + value)


def test_a_saved_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving keeps the op and the codes; the loaded model generates what the first one did."""
    gm, interface = traced()
    monkeypatch.setattr(compiler, "trace", lambda *args, **kwargs: (clone(gm), interface))
    compiled = panguq.compile(tiny(), "w8a8-dynamic", calibration=IDS)
    kernels = {m.name: m.kernel for m in compiled.report.matmuls}
    assert kernels["model.layers.0.self_attn.kv_b_proj:linear"] == "panguq.latent_attention"
    compiled.save(tmp_path / "saved")
    loaded = panguq.load(tmp_path / "saved")
    (view,) = fused(loaded.graph)
    assert op_name(view.weight) == "dequantize_weight"
    wanted = compiled.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=4, do_sample=False), wanted)
    logits = compiled(wanted).logits
    assert torch.equal(logits[:, IDS.shape[1] - 1 : -1].argmax(-1), wanted[:, IDS.shape[1] :])
