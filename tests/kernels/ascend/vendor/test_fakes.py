"""Every fake gives what its body gives, in shape and dtype, for any number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from panguq.ir.ops.opset import is_allowed, resolve
from panguq.kernels.ascend.vendor.library import npu_op, npu_ops
from panguq.selftest.npu_calls import LEGAL


def kinds(result: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in pytree.tree_leaves(result)]


@pytest.mark.parametrize("name", LEGAL)
@pytest.mark.parametrize("m", [1, 4])
def test_the_fake_agrees_with_the_body(name: str, m: int) -> None:
    op, arguments = LEGAL[name]
    kwargs = arguments(m)
    expected = kinds(op(**kwargs))
    on_meta = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), kwargs)
    assert kinds(npu_op(op).fake(**on_meta)) == expected
    assert kinds(op(**on_meta)) == expected
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(Tensor, mode.from_tensor, kwargs)
        assert kinds(op(**fakes)) == expected


class OneCall(torch.nn.Module):
    """A model that is this call; tensors with m rows are its inputs, the rest its buffers."""

    def __init__(self, name: str, m: int) -> None:
        super().__init__()
        self.op, arguments = LEGAL[name]
        self.leaves, self.form = pytree.tree_flatten(arguments(m))
        self.inputs = {
            place: leaf
            for place, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and m in leaf.shape
        }

    def forward(self, *inputs: Tensor) -> Any:
        given = dict(zip(self.inputs, inputs, strict=True))
        leaves = [given.get(place, leaf) for place, leaf in enumerate(self.leaves)]
        return self.op(**pytree.tree_unflatten(leaves, self.form))


@pytest.mark.parametrize("name", LEGAL)
def test_the_number_of_tokens_stays_symbolic(name: str) -> None:
    m, tokens = 13, torch.export.Dim("tokens", min=2, max=4096)
    model = OneCall(name, m)
    inputs = tuple(model.inputs.values())
    dynamic = tuple(
        {axis: tokens for axis, size in enumerate(tensor.shape) if size == m} for tensor in inputs
    )
    # Export fails if anything makes the number of tokens a constant.
    program = torch.export.export(model, inputs, dynamic_shapes={"inputs": dynamic})
    other = OneCall(name, 29)
    others = tuple(other.inputs.values())
    assert kinds(program.module()(*others)) == kinds(other(*others))


def test_a_file_can_name_every_op() -> None:
    assert len(npu_ops()) == len({op.op for op in npu_ops()}) > 0
    for known in npu_ops():
        assert resolve(str(known.op)) is known.op
        assert is_allowed(known.op)
        assert npu_op(known.op) is known


def test_every_op_has_a_legal_call() -> None:
    assert {known.op for known in npu_ops()} == {op for op, _ in LEGAL.values()}


def test_the_schema_is_the_one_that_was_registered() -> None:
    for known in npu_ops():
        assert torch._C.parse_schema(f"npu::{known.schema}") == known.op._schema
