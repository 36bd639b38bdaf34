"""Globs to schemes: the last match wins, siblings agree, and what stays float has a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from panguq.errors import RecipeError
from panguq.ir.edit import label, module_path
from panguq.ir.node_meta import scheme_of
from panguq.passes.assign_schemes import AssignSchemes, gives_logits
from panguq.passes.pipeline.base import PassResult, linears
from tests.model_shelf import canonical, family_context, tiny_context, trace_tiny


def assigned(*schemes: tuple[str, str], family: str = "llama") -> tuple[dict[str, str], PassResult]:
    gm, _ = canonical(family)
    result = AssignSchemes(schemes=schemes).run(gm, family_context(family, 1, 8))
    return {module_path(n): scheme_of(n).name for n in linears(gm)}, result


def test_the_default_takes_all_but_the_logits() -> None:
    schemes, result = assigned(("*", "W8A8"))
    assert schemes.pop("lm_head") == "FLOAT"
    assert set(schemes.values()) == {"W8A8"} and len(schemes) == 14
    assert result.changed == 14
    assert [(s.node, s.reason) for s in result.skipped] == [
        ("lm_head:linear", "it gives the logits; name it in the recipe to quantize it")
    ]


def test_a_named_head_is_quantized() -> None:
    schemes, result = assigned(("*", "W8A8"), ("lm_head", "W8A16"))
    assert schemes["lm_head"] == "W8A16" and not result.skipped


def test_the_last_match_wins() -> None:
    schemes, _ = assigned(("*", "W8A8"), ("*.down_proj", "W8A16"), ("*.layers.1.mlp.*", "FLOAT"))
    assert schemes["model.layers.0.mlp.down_proj"] == "W8A16"
    assert schemes["model.layers.1.mlp.down_proj"] == "FLOAT"
    assert schemes["model.layers.1.mlp.up_proj"] == "FLOAT"
    assert schemes["model.layers.1.self_attn.o_proj"] == "W8A8"


def test_without_a_default_the_rest_stays_float() -> None:
    schemes, result = assigned(("*.down_proj", "W8A8"))
    assert sorted(name for name, s in schemes.items() if s != "FLOAT") == [
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj",
    ]  # fmt: skip
    assert {s.reason for s in result.skipped} == {"no glob of the recipe matches it"}


@pytest.mark.parametrize("glob", ["*.q_proj", "*.gate_proj", "model.layers.0.self_attn.v_proj"])
def test_siblings_share_a_scheme(glob) -> None:
    with pytest.raises(RecipeError, match="must share a scheme") as caught:
        assigned(("*", "W8A8"), (glob, "FLOAT"))
    assert glob.removeprefix("*") in caught.value.message


def test_siblings_may_be_named_together() -> None:
    schemes, _ = assigned(("*", "W8A8"), ("*.[qkv]_proj", "FLOAT"))
    assert schemes["model.layers.0.self_attn.q_proj"] == "FLOAT"
    assert schemes["model.layers.0.self_attn.o_proj"] == "W8A8"


def test_a_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'\*\.dwon_proj' matches no matmul") as caught:
        assigned(("*", "W8A8"), ("*.dwon_proj", "FLOAT"))
    assert "model.layers.0.self_attn.q_proj" in caught.value.hint


class Sizes(nn.Module):
    """One linear of each of these input sizes, one after the other."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        steps = zip(sizes, [*sizes[1:], 4], strict=True)
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in steps)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize(
    ("scheme", "k", "assigned_as", "reason"),
    [
        ("W4A16", 256, "W4A16", None),
        ("W4A16", 576, "W4A16", "group_size 64: 128 does not divide k = 576"),
        ("W4A16", 96, "W4A16", "group_size 32: 128 does not divide k = 96"),
        ("W4A16-g32", 96, "W4A16-g32", None),
        ("W4A16-g32", 48, "FLOAT", "none of the group sizes 32, 64, 32 divides k = 48"),
        ("W4A16", 40, "FLOAT", "none of the group sizes 128, 64, 32 divides k = 40"),
        ("W4A16-per_channel", 40, "W4A16-per_channel", None),
        ("W4A16-per_channel", 41, "FLOAT", "k = 41 is odd, and 4-bit codes are stored in pairs"),
        ("W8A16", 41, "W8A16", None),
    ],
)
def test_group_sizes_fall_back_and_say_so(scheme, k, assigned_as, reason) -> None:
    gm, interface = trace_tiny(Sizes(k, 7), torch.randn(3, k))
    schemes = (("*", "FLOAT"), ("layers.0", scheme))
    result = AssignSchemes(schemes=schemes).run(gm, tiny_context(interface))
    node = linears(gm)[0]
    assert scheme_of(node).name == assigned_as
    said = {s.node: s.reason for s in result.skipped}
    assert said.get(label(node)) == reason
    rows = {row[0]: row[1:] for row in result.tables["schemes"].rows}
    assert rows[label(node)] == (assigned_as, reason or "")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_head_gives_logits(family) -> None:
    gm, _ = canonical(family)
    assert [label(n) for n in linears(gm) if gives_logits(n)] == ["lm_head:linear"]
