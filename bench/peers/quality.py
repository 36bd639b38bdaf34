"""One evaluation for all: perplexity, KL and top-1 agreement with the float model, in float32.

A peer's linears are evaluated with its dequantized weights. For llm-compressor's dynamic W8A8,
inputs are rounded to int8 with one scale a token as its own forward does it: max(|x|) / 127.5, so
that logits are its own bit for bit. An AscendV1 folder says itself how inputs are rounded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.peers.inputs import read_tokens
from bench.peers.job import WEIGHTS
from panguq.evaluation import Logits, evaluate, logits_of

ASCEND_V1 = "ascend-v1"
LEAST, GREATEST = -128, 127


def float_model(folder: str) -> nn.Module:
    """The float model in float32."""
    import panguq

    model: nn.Module = panguq.load_pretrained(folder)
    return model.float()


def quality(model: Logits, reference: nn.Module, tokens: str) -> dict[str, float]:
    """The metrics of `panguq.evaluate` over the evaluation tokens, and their number."""
    windows = read_tokens(Path(tokens), "evaluation")
    found = evaluate({"it": model}, windows, logits_of(reference))["it"]
    return {**found, "windows": len(windows)}


def peer_model(out: Path, folder: str, method: str) -> nn.Module:
    """What a peer wrote into `out`, as a model to evaluate."""
    if (out / ASCEND_V1).is_dir():
        from panguq.check.ascend_read import load_ascend_v1

        described: nn.Module = load_ascend_v1(out / ASCEND_V1, torch.float32)
        return described
    model = float_model(folder)
    load_dequantized(model, load_file(out / WEIGHTS))
    if method == "w8a8-dynamic":
        round_inputs(model)
    return model


def load_dequantized(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put dequantized weights under their names into the float model; tied ones may be missing.

    Raises KeyError for names that the model lacks and for linears or norms left without weights.
    """
    own = {name for name, _ in model.named_parameters()}
    strange = weights.keys() - own - {"lm_head.weight"}
    if strange or own - weights.keys():
        raise KeyError(f"unknown weights {sorted(strange)}, missing {sorted(own - weights.keys())}")
    model.load_state_dict(weights, strict=False)


class RoundedInput(nn.Module):
    """A linear `[..., k] -> [..., n]` whose input is rounded to int8 with one scale a token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Dynamic symmetric rounding, computed plainly."""
        return self.linear(per_token_int8(x))


def per_token_int8(x: Tensor) -> Tensor:
    """x `[..., k]` rounded to int8 with scale max(|x|) / 127.5 for each token, and back."""
    scale = x.abs().amax(-1, keepdim=True) / ((GREATEST - LEAST) / 2)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.clamp(torch.round(x / scale), LEAST, GREATEST) * scale


def round_inputs(model: nn.Module) -> None:
    """Let every linear but the one that gives the logits round its input."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                setattr(parent, name, RoundedInput(child))
