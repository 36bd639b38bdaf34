"""Every pass at work on a tiny graph: a golden file shows the lines it takes out and puts in."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

from panguq.data.inputs import prepare
from panguq.ir.edit import clone, find_label, get_tensor, set_tensor, weights_of
from panguq.ir.interface import Interface
from panguq.ir.node_meta import annotate, meta_of
from panguq.ir.quant_spec import parse_scheme
from panguq.ir.text.printer import print_graph
from panguq.ir.trace import trace_module
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.lowering.ascend.fuse_ascend import FuseAscend
from panguq.lowering.ascend.merge_gate_up import MergeGateUp
from panguq.lowering.fit_schemes import FitSchemes
from panguq.lowering.fuse_latent_attention import FuseLatentAttention
from panguq.lowering.lower_matmuls import LowerMatmuls
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.awq import Awq
from panguq.passes.billm import BiLlm
from panguq.passes.calibrate import Calibrate
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.decoupled_smoothquant import DecoupledSmoothQuant
from panguq.passes.flatquant import FlatQuant
from panguq.passes.gptaq import Gptaq
from panguq.passes.gptq import Gptq
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.learned_rounding import LearnedRounding
from panguq.passes.mixed_precision import MixedPrecision
from panguq.passes.outliers import Outliers
from panguq.passes.pipeline.base import Pass, PassContext
from panguq.passes.progressive_rounding import ProgressiveRounding
from panguq.passes.quantize_kv_cache import QuantizeKvCache
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.rotate import Rotate
from panguq.passes.slim_llm import SlimLlm
from panguq.passes.smoothquant import SmoothQuant
from panguq.passes.tune_scales import TuneScales
from panguq.passes.weigh_tokens import WeighTokens
from panguq.registry import all_passes
from panguq.tensors.weight_store import WeightStore
from tests.conftest import GOLDEN
from tests.model_shelf import LatentAttention, TinyModel, latent_inputs, run_pipeline, token_ids

NPU = "ascend910b1"
SHOWN = {"label", "module_path", "scheme"}  # by print_graph, or by no listing
OUTLIER_TOKEN = 5


@dataclass(frozen=True)
class Example:
    """A pass, what runs before it, and the model: its dtype, and which one it is."""

    step: Pass
    before: tuple[Pass, ...] = ()
    dtype: torch.dtype = torch.float32
    model: str = "tiny"


def start(scheme: str) -> tuple[Pass, ...]:
    """What is decided without data: all matmuls but the logits' get this scheme."""
    return Canonicalize(), AssignSchemes(schemes=(("*", scheme), ("head", "FLOAT")))


def quantized(scheme: str) -> tuple[Pass, ...]:
    """All that stands before a pass that makes codes."""
    return (*start(scheme), Calibrate(), InsertFakeQuant())


W8, W4, W2, W1 = (quantized(s) for s in ("W8A8", "W4A16-g32", "W2A16-g32", "W1A16-g32"))
LOWERED = (*W8, QuantizeWeights())
EXAMPLES = (
    Example(Canonicalize()),
    Example(start("W8A8")[1], (Canonicalize(),)),
    Example(FitSchemes(NPU), start("W4A8"), dtype=torch.bfloat16),
    Example(Rotate(), start("W4A4")),
    Example(FlatQuant(epochs=1), start("W4A4")),
    Example(SmoothQuant(), start("W8A8")),
    Example(DecoupledSmoothQuant(batches=1, rounds=1), start("W8A8")),
    Example(Awq(), start("W4A16-g32")),
    Example(MixedPrecision(choices=("W4A16-g32", "W8A16"), bits=11.5), start("W4A16-g32")),
    Example(WeighTokens(), start("W4A16-g32")),
    Example(Calibrate(), start("W8A8")),
    Example(Outliers(), (*start("W8A8"), Calibrate("percentile", percentile=99.0))),
    Example(InsertFakeQuant(), (*start("W8A8"), Calibrate())),
    Example(QuantizeWeights(), W8),
    Example(Gptq(), W4),
    Example(Gptaq(), W4),
    Example(SlimLlm(), W2),
    Example(BiLlm(), W1),
    Example(LearnedRounding(), W4),
    Example(ProgressiveRounding(steps=6), W4),
    Example(TuneScales(), (*W4, QuantizeWeights())),
    Example(QuantizeKvCache(), (Canonicalize(),), model="llama"),
    Example(FuseLatentAttention(), (Canonicalize(),), model="latent"),
    Example(MergeGateUp(), LOWERED),
    Example(LowerMatmuls(NPU), (*LOWERED, MergeGateUp()), dtype=torch.bfloat16),
    Example(FuseAscend(), (*LOWERED, MergeGateUp(), LowerMatmuls(NPU)), dtype=torch.bfloat16),
)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.step.name)
def test_before_and_after(golden: Callable[[str, str], None], example: Example) -> None:
    gm, ctx = traced(example.model, example.dtype)
    _, held = run_pipeline(gm, example.before[:2], ctx)
    ctx.reference = clone(gm)
    _, held = run_pipeline(gm, example.before[2:], ctx, held=held)
    before = clone(gm)
    run_pipeline(gm, [example.step], ctx, held=held)
    assert changes(before, gm), "the example shows nothing: the pass changes nothing in it"
    golden(f"passes/{example.step.name}", listing(before, gm))


def test_every_pass_has_an_example() -> None:
    """A pass without one is no pass that a reader can see at work: add it to EXAMPLES."""
    registered = {step.name for step in all_passes()}
    assert {example.step.name for example in EXAMPLES} == registered
    files = {path.stem for path in (GOLDEN / "passes").glob("*.txt")}
    assert files == registered


def test_a_listing_shows_what_a_pass_changed() -> None:
    """Lines that come and go, notes on a node, and weights of one name and other values."""
    before, ctx = traced()
    gm = clone(before)
    assert not changes(before, gm)
    run_pipeline(gm, start("W8A8"), ctx)
    canonical = clone(gm)
    annotate(find_label(gm, "gate:linear"), scheme=parse_scheme("W4A16"))
    annotate(find_label(gm, "up:linear"), split_from="gate:linear")
    set_tensor(gm, "norm.weight", get_tensor(gm, "norm.weight") * 2)
    removed, added = ([line[2:] for line in changes(canonical, gm) if line[0] == s] for s in "-+")
    assert [line.split(" : ")[0] for line in removed] == [line.split(" : ")[0] for line in added]
    assert {line.split(" : ")[0]: line.rpartition("  # ")[2] for line in added} == {
        "%gate:linear": "W4A16",
        "%up:linear": "W8A8, split_from",
        "%norm.weight": "other values",
    }


@functools.cache
def _traced(name: str, dtype: torch.dtype) -> tuple[fx.GraphModule, Interface]:
    torch.manual_seed(0)
    if name == "latent":
        return trace_module(LatentAttention().eval(), latent_inputs(2, 3))
    if name == "llama":
        sizes = dict(hidden_size=32, intermediate_size=32, vocab_size=96, num_attention_heads=2)
        return trace_causal_lm(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).eval())
    model = TinyModel().to(dtype)
    with torch.no_grad():  # a few weights, a token and a channel that no range serves well
        model.embed.weight[OUTLIER_TOKEN, 3] = 30
        model.down.weight[::16] *= 8
    return trace_module(model, (token_ids(2, 3),))


def traced(
    name: str = "tiny", dtype: torch.dtype = torch.float32
) -> tuple[fx.GraphModule, PassContext]:
    """A copy of the model's raw trace, and the data that passes look at."""
    gm, interface = _traced(name, dtype)
    rows = [token_ids(1, 32, seed) for seed in range(4)]
    batches = [prepare(interface, row) if name == "llama" else {"ids": row} for row in rows]
    ctx = PassContext(interface, WeightStore(), batches=batches, probe=batches[0])
    return clone(gm), ctx


def listing(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """The graph before (lines with a space or -) and after (with a space or +) as one text."""
    old, new = lines(before, before), lines(after, before)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    text = []
    for kind, i, j, k, m in matcher.get_opcodes():
        if kind == "equal":
            text += [f"  {line}" for line in old[i:j]]
        else:
            text += [f"- {line}" for line in old[i:j]] + [f"+ {line}" for line in new[k:m]]
    return "\n".join(text) + "\n"


def changes(before: fx.GraphModule, after: fx.GraphModule) -> list[str]:
    """The lines of the listing that are not in both graphs."""
    return [line for line in listing(before, after).splitlines() if line[0] != " "]


def lines(gm: fx.GraphModule, before: fx.GraphModule) -> list[str]:
    """One line a node: `print_graph`'s, with the names of what passes noted on it.

    A weight says `other values` where it has not those of `before`, which differ in their last bits
    between machines and are shown by no golden file.
    """
    old, new = weights_of(before), weights_of(gm)
    found = []
    for node, line in zip(gm.graph.nodes, print_graph(gm).splitlines(), strict=True):
        text, _, scheme = line.partition("  # ")
        notes = [scheme] if scheme else []
        notes += sorted(key for key in meta_of(node).filled() if key not in SHOWN)
        name = str(node.target)
        if node.op == "get_attr" and name in old and not torch.equal(old[name], new[name]):
            notes.append("other values")
        found.append(text + (f"  # {', '.join(notes)}" if notes else ""))
    return found
