"""Every op's fake says what its body returns: shape, dtype and strides, for inputs in any layout.

`torch.compile` plans memory by the fake's strides and checks them at run time.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import panguq.kernels
import panguq.lowering
from panguq.built.int8_sums import int8_sums
from panguq.ir.ops.kronecker import kronecker
from panguq.ir.ops.opset import allowed_ops, define_op, resolve
from panguq.selftest.npu_calls import LEGAL
from tests.kernels.ascend.own.own_calls import OWN
from tests.kernels.expert_calls import EXPERT_CALLS


def of_built_code(m: int) -> dict[str, Tensor]:
    codes = torch.randint(-128, 128, (m + 5, 64), dtype=torch.int8)
    return {"codes": codes[:m], "weight": codes[m:]}


BUILT = {"built.int8_sums": (int8_sums, of_built_code)}


def of_two_factors(m: int) -> dict[str, Tensor]:
    return {"x": torch.randn(2, m, 12), "left": torch.randn(3, 3), "right": torch.randn(4, 4)}


MAPS = {"kronecker": (kronecker, of_two_factors)}
CALLS = {
    **BUILT,
    **MAPS,
    **OWN,
    **EXPERT_CALLS,
    **{f"npu.{name}": call for name, call in LEGAL.items()},
}


def as_is(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """The same values, the last two dimensions the other way round in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def heads_inside(tensor: Tensor) -> Tensor:
    """`[a, b, c, ...]` laid out as `[a, c, b, ...]`, as the heads of attention are."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() > 3 else tensor


def sliced(tensor: Tensor) -> Tensor:
    """A part of a larger tensor: rows do not follow each other."""
    if tensor.dim() < 2:
        return tensor
    size = tensor.shape[-1]
    return torch.cat((tensor, tensor), -1)[..., :size]


def expanded(tensor: Tensor) -> Tensor:
    """The first row of a batch for all of it, as `expand` makes it."""
    return tensor[:1].expand_as(tensor) if tensor.dim() > 2 else tensor


LAYOUTS = (as_is, transposed, heads_inside, sliced, expanded)


def kinds(result: Any) -> list[tuple[Any, ...]]:
    """Shape, dtype and strides; the stride of a size below 2 means nothing."""
    found = []
    for tensor in pytree.tree_leaves(result):
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        matter = [stride if size > 1 else 0 for size, stride in strides]
        found.append((tuple(tensor.shape), tensor.dtype, matter if tensor.numel() else None))
    return found


def fake_kinds(op: Any, arguments: dict[str, Any]) -> list[tuple[Any, ...]]:
    with FakeTensorMode() as mode:
        return kinds(op(**pytree.tree_map_only(Tensor, mode.from_tensor, arguments)))


@pytest.mark.parametrize("name", CALLS)
def test_the_fake_has_the_bodys_strides(name: str) -> None:
    op, arguments = CALLS[name]
    for m in (1, 3, 5):
        given = arguments(m)
        for layout in LAYOUTS:
            laid_out = pytree.tree_map_only(Tensor, layout, given)
            assert fake_kinds(op, laid_out) == kinds(op(**laid_out)), (layout.__name__, m)
        for key, value in given.items():  # one argument in another layout than the rest
            if isinstance(value, Tensor) and value.dim() > 1:
                mixed = {**given, key: transposed(value)}
                assert fake_kinds(op, mixed) == kinds(op(**mixed)), (key, m)


def test_every_op_is_called() -> None:
    for package in (panguq.kernels, panguq.lowering):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".triton" not in module.name:  # kernels for an NPU: they define no op
                import_module(module.name)
    ours = {name for name in allowed_ops() if name.startswith(("panguq", "npu."))}
    called = {str(op) for op, _ in CALLS.values()}
    missing = {name for name in ours if name not in called and "test" not in name}
    assert not missing and called <= ours
    assert all(resolve(name) is not None for name in called)


def test_a_fake_with_other_strides_is_found() -> None:
    wrong = define_op(
        "turned(Tensor x) -> Tensor",
        fake=lambda x: x.new_empty((x.shape[1], x.shape[0])),
        namespace="panguq_test",
    )(lambda x: x.clone().t())
    given = {"x": torch.randn(2, 3)}
    assert fake_kinds(wrong, given) != kinds(wrong(**given))
