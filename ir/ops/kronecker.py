"""A linear map of the last axis that is the Kronecker product of two small matrices."""

from __future__ import annotations

from torch import Tensor

from panguq.errors import InputError
from panguq.ir.ops.opset import define_op


def _check(x: Tensor, left: Tensor, right: Tensor) -> None:
    square = all(m.dim() == 2 and m.shape[0] == m.shape[1] for m in (left, right))
    if not square or x.shape[-1] != left.shape[0] * right.shape[0]:
        shapes = f"{list(left.shape)} and {list(right.shape)}"
        raise InputError(f"kronecker: factors {shapes} do not fit rows of {x.shape[-1]} numbers")


@define_op(
    "kronecker(Tensor x, Tensor left, Tensor right) -> Tensor",
    fake=lambda x: x.new_empty(x.shape),
    check=_check,
)
def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`x (left ⊗ right)`: each row of x as a matrix X `[a, b]` becomes `left^T X right`.

    x `[..., a * b]`, left `[a, a]`, right `[b, b]`, all of one dtype. Two small products cost
    a * b * (a + b) multiplications a row, in place of (a * b)^2. The first one's result is rounded
    to x's dtype, as NPU kernels do.
    """
    runs = x.reshape(-1, left.shape[0], right.shape[0])
    return (left.T @ (runs @ right)).reshape(x.shape)
