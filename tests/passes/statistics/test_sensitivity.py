"""What a scheme is expected to cost, against what it really costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, fx, nn

from panguq.errors import InputError, NumericsError
from panguq.ir.edit import clone, find_label, get_tensor, label, set_tensor
from panguq.ir.quant_spec import Scheme, parse_scheme
from panguq.ir.run.interpret import run, values
from panguq.passes.assign_schemes import gives_logits
from panguq.passes.codes.weight_scales import min_max_scale, quantize_groups
from panguq.passes.pipeline.base import PassContext, linears
from panguq.passes.statistics.sensitivity import drawn, measure, quantize_activation
from tests.model_shelf import canonical, family_context, tiny_context, trace_tiny

NO_SEARCH = (1.0,)
FEW = ("W2A16-g32", "W3A16-g32", "W4A16_ASYM-g32", "W6A16-g32", "W8A16")


def schemes(*names: str) -> tuple[Scheme, ...]:
    return tuple(parse_scheme(name) for name in names)


def siblings(gm: fx.GraphModule) -> list[tuple[fx.Node, ...]]:
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in linears(gm):
        if not gives_logits(node):
            groups.setdefault(node.args[0], []).append(node)
    return [tuple(group) for group in groups.values()]


def estimates(
    gm: fx.GraphModule, ctx: PassContext, *names: str
) -> dict[tuple[fx.Node, ...], list[float]]:
    return measure(gm, ctx, {g: schemes(*names) for g in siblings(gm)}, NO_SEARCH)


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    size = scheme.weight.group_size_for(weight.shape[1])
    groups = weight.reshape(weight.shape[0], -1, size)
    return quantize_groups(groups, *min_max_scale(weight, size, scheme.weight), scheme.weight).view(
        weight.shape
    )


def log_probs(gm: fx.GraphModule, ctx: PassContext) -> Tensor:
    return torch.cat([run(gm, b)[0].flatten(0, -2).log_softmax(-1) for b in ctx.batches])


def true_kl(gm: fx.GraphModule, ctx: PassContext, group: tuple[fx.Node, ...], to: Scheme) -> float:
    changed = clone(gm)
    for node in group:
        name = str(node.args[1].target)
        set_tensor(changed, name, rounded(get_tensor(gm, name), to))
    before, after = log_probs(gm, ctx), log_probs(changed, ctx)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_the_estimate_ranks_groups_and_schemes_as_the_truth_does() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama", sequences=8, tokens=32)
    found = estimates(gm, ctx, *FEW)
    pairs = [
        (kls[i], true_kl(gm, ctx, group, scheme))
        for group, kls in found.items()
        for i, scheme in enumerate(schemes(*FEW))
    ]
    estimated, true = zip(*pairs, strict=True)
    assert spearmanr(estimated, true).statistic > 0.95
    at_four_bits = [(kls[2], true_kl(gm, ctx, g, schemes(FEW[2])[0])) for g, kls in found.items()]
    ratios = [estimate / truth for estimate, truth in at_four_bits]
    assert min(ratios) > 0.5 and max(ratios) < 2.0


def test_the_estimate_is_the_fisher_information() -> None:
    """Against every label's gradient in turn, weighted by its probability, from autograd."""
    gm, _ = canonical("llama")
    ctx = family_context("llama", sequences=1, tokens=6)
    node = find_label(gm, "model.layers.1.mlp.down_proj:linear")
    name = str(node.args[1].target)
    weight = get_tensor(gm, name)
    scheme = parse_scheme("W3A16-g32")
    tail = [n for n in gm.graph.nodes if n.op != "placeholder"]
    start = values(gm, ctx.batches[0], [node.args[0], node])
    squares = torch.zeros_like(weight)
    x = start[node.args[0]][0]

    # The last down_proj ends in: residual add, norm, logits. The norm's body has a gradient.
    residual = values(gm, ctx.batches[0], [_add_after(node)])[_add_after(node)] - start[node]
    norm = next(n for n in reversed(tail) if "rms_norm" in str(n.target))
    gain, eps = get_tensor(gm, str(norm.args[1].target)), norm.args[2]
    head = get_tensor(gm, "lm_head.weight")

    def logits(w: Tensor) -> Tensor:
        y = residual[0] + x @ w.T
        return (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * gain) @ head.T

    torch.testing.assert_close(logits(weight), run(gm, ctx.batches[0])[0][0], rtol=1e-4, atol=1e-4)
    wanted = weight.clone().requires_grad_()
    log_p = logits(wanted).log_softmax(-1)
    for token in range(6):
        for one in range(log_p.shape[1]):
            (gradient,) = torch.autograd.grad(log_p[token, one], wanted, retain_graph=True)
            squares += log_p[token, one].exp().detach() * gradient.square()
    error = (rounded(weight, scheme) - weight).square()
    expected = float((squares * error).sum()) / 6 / 2

    many = replace(ctx, batches=list(ctx.batches) * 300)
    found = measure(gm, many, {(node,): (scheme,)}, NO_SEARCH)[(node,)][0]
    assert found == pytest.approx(expected, rel=0.1)


def _add_after(node: fx.Node) -> fx.Node:
    return next(user for user in node.users if user.target is torch.ops.aten.add.Tensor)


def test_a_weight_on_the_grid_costs_nothing() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama", sequences=2, tokens=8)
    group = siblings(gm)[0]
    for node in group:
        name = str(node.args[1].target)
        codes = torch.randint(-7, 8, tuple(node.args[1].meta["val"].shape)).float()
        codes[:, ::32] = 7.0  # every group of 32 uses its largest code
        set_tensor(gm, name, codes * 2.0**-6)
    found = estimates(gm, ctx, "W4A16-g32", "W3A16-g32")
    assert found[group][0] == 0.0
    assert found[group][1] > 0.0


def test_a_weight_of_zeros_costs_nothing() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama", sequences=2, tokens=8)
    (group, *_) = siblings(gm)
    for node in group:
        get_tensor(gm, str(node.args[1].target))
        set_tensor(gm, str(node.args[1].target), torch.zeros(node.args[1].meta["val"].shape))
    assert estimates(gm, ctx, "W4A16", "W2A16", "W8A16")[group] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("family", ["llama", "openpangu"])
def test_more_bits_never_cost_more(family: str) -> None:
    gm, _ = canonical(family)
    ctx = family_context(family, sequences=3, tokens=16)
    for group, kls in estimates(gm, ctx, *FEW).items():
        assert kls == sorted(kls, reverse=True), label(group[0])
        assert kls[0] > kls[-1] > 0.0


def test_quantized_activations_add_to_the_cost() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama", sequences=3, tokens=16)
    names = ("W8A16", "W8A8_DYNAMIC", "W8A8", "W4A16-per_channel", "W4A4")
    for kls in estimates(gm, ctx, *names).values():
        weight_only, dynamic, static, four, both = kls
        assert weight_only < dynamic < both
        assert weight_only < static
        assert four < both


def test_the_cost_of_activations_is_that_of_a_plain_run() -> None:
    """One linear, Gaussian noise for labels: half the relative squared error of the output."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 32)
    gm, interface = trace_tiny(nn.Linear(32, 48, bias=False), x)
    ctx = tiny_context(interface, *torch.randn(40, 4, 64, 32))
    (node,) = linears(gm)
    for name in ("W8A8_DYNAMIC", "W4A4", "W8A8", "W4A16_ASYM-g32"):
        scheme = parse_scheme(name)
        weight = get_tensor(gm, str(node.args[1].target))
        wrong = right = 0.0
        for batch in ctx.batches:
            given = next(iter(batch.values()))
            seen = (
                given
                if scheme.activation is None
                else quantize_activation(given, scheme.activation)
            )
            wrong += float((seen @ rounded(weight, scheme).T - given @ weight.T).square().sum())
            right += float((given @ weight.T).square().sum())
        found = measure(gm, ctx, {(node,): (scheme,)}, NO_SEARCH)[(node,)][0]
        assert found == pytest.approx(wrong / right / 2, rel=0.1), name


def test_activations_on_the_grid() -> None:
    spec = parse_scheme("W8A8").activation
    x = torch.arange(-128, 128).float().view(8, 32) / 16
    torch.testing.assert_close(quantize_activation(x, spec), x)
    outlier = torch.cat([x, torch.full((1, 32), 500.0)])  # a massive token does not widen the range
    assert float(quantize_activation(outlier, spec)[-1].max()) < 9.0


def test_the_same_seed_gives_the_same_numbers() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama", sequences=2, tokens=8)
    first, again = (list(estimates(gm, ctx, *FEW).values()) for _ in range(2))
    assert first == again
    other = list(estimates(gm, replace(ctx, seed=1), *FEW).values())
    assert first != other


def test_the_graph_and_its_weights_stay() -> None:
    gm, _ = canonical("llama")
    before = clone(gm)
    estimates(gm, family_context("llama", sequences=1, tokens=4), "W4A16", "W8A8")
    for node in linears(before):
        name = str(node.args[1].target)
        assert get_tensor(gm, name) is get_tensor(before, name)
        assert not get_tensor(gm, name).requires_grad


def test_a_single_token() -> None:
    gm, _ = canonical("llama")
    found = estimates(gm, family_context("llama", sequences=1, tokens=2), "W4A16")
    assert all(kl >= 0 for kls in found.values() for kl in kls)


def test_without_data_and_with_broken_weights() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama", sequences=1, tokens=4)
    with pytest.raises(InputError, match="no calibration data"):
        estimates(gm, replace(ctx, batches=()), "W4A16")
    broken = get_tensor(gm, "model.layers.1.mlp.up_proj.weight").clone()
    broken[0, 0] = torch.inf
    set_tensor(gm, "model.layers.1.mlp.up_proj.weight", broken)
    with pytest.raises(NumericsError, match=r"up_proj\.weight"):
        estimates(gm, ctx, "W4A16")


def test_labels_are_drawn_by_their_probabilities() -> None:
    share = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    labels = drawn(share.expand(40_000, -1), torch.Generator().manual_seed(0))
    assert labels.shape == (40_000, 1)
    found = labels.flatten().bincount(minlength=6) / 40_000
    torch.testing.assert_close(found, share, rtol=0, atol=4 * (0.25 / 40_000) ** 0.5)
    assert not found[share == 0].any()
    assert torch.equal(labels, drawn(share.expand(40_000, -1), torch.Generator().manual_seed(0)))
