import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panguq.ir.edit import store_folded, weights_of
from panguq.tensors import row_slices
from panguq.tensors.folded_weight import FoldedWeight, materialized
from panguq.tensors.safetensors_files import read_mapped, write_tensors
from panguq.tensors.weight_store import WeightStore

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def example(dtype: torch.dtype, n: int = 7, k: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    rows = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    columns = torch.rand(k, generator=generator, dtype=torch.float64) + 0.5
    return weight, rows, columns


@given(st.sampled_from(DTYPES), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_product_is_computed_in_float64_and_rounded_once(dtype, n, k, seed) -> None:
    weight, rows, columns = example(dtype, n, k, seed)
    folded = FoldedWeight(weight, {0: rows, 1: columns})
    expected = (weight.double() * rows[:, None] * columns).to(dtype)
    assert torch.equal(materialized(folded), expected)
    assert (folded.shape, folded.dtype, folded.nbytes) == (weight.shape, dtype, weight.nbytes)


def test_slices_do_not_change_it(monkeypatch) -> None:
    weight, rows, columns = example(torch.bfloat16)
    whole = materialized(FoldedWeight(weight, {0: rows, 1: columns}))
    monkeypatch.setattr(row_slices, "ELEMENTS_AT_ONCE", 10)
    assert torch.equal(materialized(FoldedWeight(weight, {0: rows, 1: columns})), whole)


def test_every_op_reads_the_product() -> None:
    weight, _, columns = example(torch.bfloat16)
    folded = FoldedWeight(weight, {1: columns})
    plain = materialized(folded)
    x = torch.randn(3, 5).bfloat16()
    linear = torch.nn.functional.linear
    for result, expected in (
        (linear(x, folded), linear(x, plain)),
        (folded.float(), plain.float()),
        (torch.cat([folded, folded]), torch.cat([plain, plain])),
        (folded[2:4], plain[2:4]),
        (folded.detach().contiguous(), plain),
    ):
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)


def test_two_folds_round_once() -> None:
    weight, rows, columns = example(torch.bfloat16)
    twice = FoldedWeight(FoldedWeight(weight, {1: columns}), {0: rows, 1: columns})
    expected = (weight.double() * rows[:, None] * (columns * columns)).bfloat16()
    assert torch.equal(materialized(twice), expected)


def test_what_nobody_quantized_is_stored_at_the_end() -> None:
    weight, _, columns = example(torch.float32)
    root = torch.nn.Module()
    root.register_buffer("weight", FoldedWeight(weight, {1: columns}))
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("weight")
    graph.output((graph.call_function(torch.ops.aten.linear.default, (x, w)),))
    gm = torch.fx.GraphModule(root, graph)
    x = torch.randn(2, 5)
    before = gm(x)[0]
    store_folded(gm, WeightStore().put)
    assert type(weights_of(gm)["weight"]) is torch.Tensor
    assert torch.equal(gm(x)[0], before)


def test_a_file_holds_the_product(tmp_path) -> None:
    """As the dump of a graph whose weights are still folded."""
    weight, rows, _ = example(torch.float32)
    folded = FoldedWeight(weight, {0: rows})
    write_tensors(tmp_path / "w.safetensors", {"folded": folded, "plain": weight})
    found = read_mapped(tmp_path / "w.safetensors")
    assert torch.equal(found["folded"], materialized(folded))
    assert torch.equal(found["plain"], weight)
