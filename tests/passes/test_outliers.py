"""Outlier channels are split exactly; the worst inputs are treated within the budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from panguq.errors import RecipeError
from panguq.ir.edit import find_label, label, weights_of
from panguq.ir.node_meta import meta_of, scheme_of
from panguq.ir.run.interpret import run, values
from panguq.ir.text.printer import Hasher, print_graph
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.outliers import Outliers
from panguq.passes.pipeline.base import PassResult, linears
from panguq.passes.pipeline.runner import PassRecord
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.smoothquant import SmoothQuant
from panguq.passes.weigh_tokens import WeighTokens
from tests.model_shelf import run_passes, tiny_context, trace_tiny


class Net(nn.Module):
    """q and k read x; out reads what relu leaves of their sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.out = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.q(x) + self.k(x)).relu())


def data(channels: tuple[int, ...] = (), tokens: tuple[int, ...] = ()) -> Tensor:
    """Normal values; these channels have one token 400 times as large, these tokens all."""
    x = torch.randn(96, 32, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    for channel in channels:
        x[40, channel] = 400.0
    for token in tokens:
        x[token] *= 50
    return x


def treated(
    x: Tensor, *passes, scheme: str = "W8A8", module: nn.Module | None = None
) -> tuple[fx.GraphModule, list[PassRecord]]:
    gm, interface = trace_tiny(module or Net(), torch.randn(3, 32))
    return gm, run_passes(gm, tiny_context(interface, x), scheme, Calibrate(), *passes)


def rows(result: PassResult, name: str) -> list[dict[str, object]]:
    table = result.tables[name]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def schemes(gm: fx.GraphModule) -> dict[str, str]:
    return {label(n): scheme_of(n).name for n in linears(gm)}


# --- split --------------------------------------------------------------------------------------


def test_planted_channels_are_found_and_split() -> None:
    gm, records = treated(data(channels=(3, 17)), Outliers())
    split = rows(records[-1].result, "split")
    assert [(row["value"], row["which"]) for row in split if row["value"] == "x"] == [("x", "3 17")]
    side = find_label(gm, "q:linear.outliers")
    assert scheme_of(side).is_float and meta_of(side).split_from == "q:linear"
    assert scheme_of(find_label(gm, "q:linear.main")).name == "W8A8"
    found = weights_of(gm)
    weight = Net().q.weight.detach()
    assert torch.equal(found["q.weight_outliers"], weight[:, [3, 17]])
    assert not found["q.weight_without_outliers"][:, [3, 17]].any()
    assert found["q.weight_outlier_channels"].tolist() == [3, 17]


def test_the_split_is_exact() -> None:
    """Proved in float64 by the runner, and equal here for inputs of any size."""
    gm, records = treated(data(channels=(3, 17)), Outliers())
    assert records[-1].result.changed >= 2 and records[-1].result.sites
    assert records[-1].proved_difference < 1e-12
    plain, _ = trace_tiny(Net(), torch.randn(3, 32))
    x = torch.randn(9, 32) * 100
    torch.testing.assert_close(run(gm, {"x": x})[0], run(plain, {"x": x})[0], rtol=1e-5, atol=1e-3)


def test_the_rest_of_a_split_matmul_keeps_all_that_passes_know() -> None:
    """Token weights too: GPTQ counts tokens by them when it solves the rest."""
    gm, _ = treated(data(channels=(3, 17)), WeighTokens(), Outliers())
    q, k = (meta_of(find_label(gm, f"{name}:linear.main")) for name in "qk")
    assert q.scheme is k.scheme and q.scheme is not None and not q.scheme.is_float
    assert q.input_statistics is k.input_statistics is not None
    assert q.input_range is k.input_range is not None
    assert q.token_weights is k.token_weights is not None
    assert len(q.token_weights[0]) == 96
    side = meta_of(find_label(gm, "q:linear.outliers"))
    assert side.token_weights is side.input_statistics is None


def test_without_outliers_nothing_happens() -> None:
    gm, records = treated(data(), Outliers())
    plain, _ = treated(data())
    assert records[-1].result.changed == 0 and not records[-1].result.skipped
    assert print_graph(gm, Hasher()) == print_graph(plain, Hasher())


def test_a_channel_that_is_always_large_lies_within_the_range() -> None:
    """It is no outlier of the range, which holds it: smoothing is for that."""
    x = data()
    x[:, 5] *= 20
    _, records = treated(x, Outliers(threshold=2.0))
    assert [r for r in rows(records[-1].result, "split") if r["value"] == "x"] == []


def test_too_many_channels_are_left_alone_with_a_reason() -> None:
    gm, records = treated(data(channels=(1, 2, 3, 4, 5)), Outliers())
    reasons = {skip.node: skip.reason for skip in records[-1].result.skipped}
    assert reasons["x"] == "5 outlier channels are too many for a side matmul"
    assert "q:linear.outliers" not in {label(n) for n in gm.graph.nodes}


def test_the_split_keeps_what_static_quantization_would_lose() -> None:
    x = data(channels=(3,))
    wanted = Net().q(x).detach()
    finish = (InsertFakeQuant(), QuantizeWeights())
    noise = {}
    for name, steps in {"split": (Outliers(), *finish), "naive": finish}.items():
        gm, _ = treated(x, *steps)
        matmul = find_label(gm, "q:linear")
        error = values(gm, {"x": x}, [matmul])[matmul] - wanted
        noise[name] = error[40].norm() / wanted[40].norm()
    assert noise["naive"] > 0.5 and noise["split"] < 0.05


class SharedWeight(nn.Module):
    """One weight, two inputs, each with an outlier channel of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = x.roll(7, -1).abs()
        return functional.linear(x.relu(), self.weight) + functional.linear(y, self.weight)


def test_two_readers_of_a_weight_are_split_apart() -> None:
    gm, records = treated(data(channels=(3,)), Outliers(), module=SharedWeight())
    assert [r["which"] for r in rows(records[-1].result, "split")] == ["3", "10"]
    x = data(channels=(3,))
    wanted = SharedWeight()(x).detach()
    torch.testing.assert_close(run(gm, {"x": x})[0], wanted, rtol=1e-4, atol=1e-2)


def test_a_split_matmul_goes_on_through_all_passes() -> None:
    gm, records = treated(
        data(channels=(3,)), Outliers(), Outliers(treatment="per-token"), InsertFakeQuant(),
        QuantizeWeights(),
    )  # fmt: skip
    assert records[-1].step.name == "quantize-weights"
    assert scheme_of(find_label(gm, "q:linear.outliers")).is_float


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16", "FLOAT"])
def test_float_activations_are_left_alone(scheme) -> None:
    _, records = treated(data(channels=(3,)), Outliers(), scheme=scheme)
    assert records[-1].result.changed == 0


def test_dynamic_activations_are_split_by_plain_tokens() -> None:
    _, records = treated(data(channels=(3,)), Outliers(), scheme="W8A8_DYNAMIC")
    split = rows(records[-1].result, "split")
    assert split[0]["which"] == "3"
    assert float(split[0]["range"]) == pytest.approx(2.0, abs=0.1)


# --- per token, float, clip ---------------------------------------------------------------------


def poor() -> Tensor:
    """One channel dwarfs the others in every token: a static range serves them badly."""
    x = data()
    x[:, 5] *= 300
    return x


@pytest.mark.parametrize(
    ("treatment", "becomes"), [("per-token", "W8A8_DYNAMIC"), ("float", "FLOAT")]
)
def test_the_worst_inputs_are_treated(treatment, becomes) -> None:
    gm, records = treated(poor(), Outliers(treatment=treatment, floor_db=200, max_share=1.0))
    assert set(schemes(gm).values()) == {becomes}
    assert records[-1].result.changed == 3
    assert {row["treatment"] for row in rows(records[-1].result, "treated")} == {treatment}


def test_clip_says_and_does_nothing() -> None:
    gm, records = treated(poor(), Outliers(treatment="clip", floor_db=200))
    assert set(schemes(gm).values()) == {"W8A8"}
    assert records[-1].result.changed == 0
    assert len(rows(records[-1].result, "treated")) == 2


def test_good_inputs_are_left_alone() -> None:
    gm, records = treated(data(), Outliers(treatment="per-token", floor_db=5, max_share=1.0))
    assert set(schemes(gm).values()) == {"W8A8"}
    assert records[-1].result.changed == 0


def test_the_budget_is_kept_and_the_worst_come_first() -> None:
    """q and k hold 2048 of 2304 weights, out 256: a budget of 20 % is out's alone."""
    step = Outliers(treatment="per-token", floor_db=200, max_share=0.2)
    gm, records = treated(poor(), step)
    assert schemes(gm) == {
        "q:linear": "W8A8", "k:linear": "W8A8", "out:linear": "W8A8_DYNAMIC",
    }  # fmt: skip
    skipped = records[-1].result.skipped
    assert [s.node for s in skipped] == ["x"] and "max_share 0.2 is spent" in skipped[0].reason
    gm, _ = treated(poor(), Outliers(treatment="per-token", floor_db=200, max_share=0.0))
    assert set(schemes(gm).values()) == {"W8A8"}
    ranked = rows(
        treated(poor(), Outliers(treatment="clip", floor_db=200))[1][-1].result, "treated"
    )
    order = [float(row["input_sqnr_db"]) for row in ranked]
    assert order == sorted(order)


def test_columns_that_were_split_count_for_the_budget() -> None:
    x = data(channels=(3,))
    step = Outliers(treatment="per-token", floor_db=200, max_share=256 / 2304 + 1e-9)
    gm, _ = treated(x, step)
    assert schemes(gm)["out:linear"] == "W8A8_DYNAMIC"
    gm, _ = treated(x, Outliers(), step)
    kept = [s for name, s in schemes(gm).items() if name.startswith("out:linear")]
    assert "W8A8_DYNAMIC" not in kept


def test_siblings_are_treated_alike() -> None:
    gm, _ = treated(poor(), Outliers(treatment="float", floor_db=200, max_share=0.95))
    found = schemes(gm)
    assert found["q:linear"] == found["k:linear"]


def test_massive_tokens_do_not_make_an_input_poor() -> None:
    """The range is that of plain tokens; what a massive token loses is the split's business."""
    clean = rows(treated(data(), Outliers(treatment="clip", floor_db=200))[1][-1].result, "treated")
    massive = rows(
        treated(data(tokens=(7,)), Outliers(treatment="clip", floor_db=200))[1][-1].result,
        "treated",
    )
    db = [next(float(r["input_sqnr_db"]) for r in t if r["value"] == "x") for t in (clean, massive)]
    assert abs(db[0] - db[1]) < 1.0


@pytest.mark.parametrize("options", [{"threshold": 0.9}, {"max_share": 1.1}, {"max_share": -0.1}])
def test_wrong_options_are_refused(options) -> None:
    with pytest.raises(RecipeError, match="outliers: threshold"):
        Outliers(**options)


def test_smoothing_first_leaves_fewer_outliers() -> None:
    """The passes compose: nothing is left of a constant outlier channel after a norm."""

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            with torch.no_grad():
                self.norm.weight[5] = 100.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    worst = []
    for first in ((), (SmoothQuant(),)):
        gm, interface = trace_tiny(Normed(), torch.randn(3, 32))
        ctx = tiny_context(interface, data())
        clip = Outliers(treatment="clip", floor_db=200)
        records = run_passes(gm, ctx, "W8A8", *first, Calibrate(), clip)
        worst.append(float(rows(records[-1].result, "treated")[0]["input_sqnr_db"]))
    assert worst[1] > worst[0] + 5
