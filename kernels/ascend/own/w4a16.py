"""W4A16 by panguq's own kernel: 16-bit activations times 4-bit weights with one scale per group.

Vector cores turn codes into 16-bit integers, the cube core multiplies, and the sums of a block of k
are scaled, not the weights: a block lies in one group. With one split (data-parallel) each core
computes whole outputs; with more, k is divided, too (Split-K), for shapes with too few outputs to
keep every core busy. The body here is what the Triton kernels in `triton/w4a16.py` compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.errors import LoweringError
from panguq.ir.ops.opset import define_op
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.own.int4_weight import QUARTERS, codes_of_quarters
from panguq.kernels.ascend.own.tiles import split_bounds, tile_refusal
from panguq.kernels.ascend.own.triton.launch import NAMESPACE, launch_w4a16

BIAS_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float16}


def refusal(
    m: int | None,
    n: int,
    k: int,
    group_size: int,
    splits: int = 1,
    tile: tuple[int, int, int] | None = None,
    chip: Chip | None = None,
) -> str | None:
    """Why the kernels cannot do this matmul of m tokens (None: any), n outputs, k inputs.

    `group_size` 0 is one scale per output. `tile` is (block_m, block_n, block_k).
    `chip`: the one that has room for it; None: any that is known.
    """
    if n % CODES_PER_WORD:
        return f"n={n} is not a multiple of {CODES_PER_WORD}, as 4-bit weights need"
    if group_size < 0:
        return f"group size {group_size} is negative"
    if splits < 1:
        return f"{splits} splits: there is at least one"
    if tile is None:
        return None
    if reason := tile_refusal("w4a16_split_k" if splits > 1 else "w4a16_data_parallel", tile, chip):
        return reason
    if group_size % tile[2]:
        return f"block_k={tile[2]} does not divide the group size {group_size}"
    if splits > -(-k // tile[2]):
        return f"{splits} splits: k={k} has only {-(-k // tile[2])} blocks of {tile[2]}"
    return None


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    splits: int,
    tile: list[int],
) -> None:
    """Raise LoweringError unless the arguments are what the op documents."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise LoweringError(f"{NAMESPACE}.w4a16: {message}")

    require(x.dtype in BIAS_DTYPE, f"x is {x.dtype}, not float16 or bfloat16")
    require(weight.dtype == torch.int16, f"weight is {weight.dtype}, not int16")
    require(weight.dim() == 2, f"weight has {weight.dim()} dimensions, not 2")
    k, n = weight.shape[0], weight.shape[1] * QUARTERS
    require(x.shape[-1] == k, f"x has {x.shape[-1]} inputs, weight {k}")
    require(len(tile) == 3, f"tile {tile} is not (block_m, block_n, block_k)")
    reason = refusal(None, n, k, group_size, splits, (tile[0], tile[1], tile[2]))
    require(reason is None, str(reason))
    groups = -(-k // group_size) if group_size else 1
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is None:
            continue
        require(tensor.dtype == x.dtype, f"{name} is {tensor.dtype}, x is {x.dtype}")
        shapes = [[groups, n]] if group_size else [[n], [1, n]]
        require(list(tensor.shape) in shapes, f"{name} is {list(tensor.shape)}, not {shapes[0]}")
    if bias is not None:
        expected = BIAS_DTYPE[x.dtype]
        require(
            bias.dtype == expected, f"bias is {bias.dtype}; with x of {x.dtype} it is {expected}"
        )
        require(tuple(bias.shape) == (n,), f"bias is {list(bias.shape)}, not [{n}]")


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1] * QUARTERS))


@define_op(
    "w4a16(Tensor x, Tensor weight, Tensor scale, Tensor? offset, Tensor? bias,"
    " int group_size, int splits, int[] tile) -> Tensor",
    fake=_fake,
    namespace=NAMESPACE,
    check=_check,
    npu=launch_w4a16,
)
def w4a16(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    splits: int,
    tile: list[int],
) -> Tensor:
    """x @ ((code + offset) * scale) + bias: float16 or bfloat16 [..., n].

    x float16 or bfloat16 [..., k]; weight int16 [k, n / 4] as `int4_quarters` packs; scale and
    offset [ceil(k / group_size), n] in x's dtype, or [n] with `group_size` 0; bias [n], float32 for
    bfloat16 and float16 for float16. Of each group (of each part, if that is smaller) x and codes
    are multiplied and summed, then scaled; all is float32, and the result is rounded once. With
    `splits` above 1, k is divided into so many parts of whole blocks, whose sums are added in the
    order of k, so that the same input gives the same bits in every run. Raises LoweringError.
    """
    codes = codes_of_quarters(weight).to(torch.float32)
    k, n = codes.shape
    tokens = x.reshape(-1, k).to(torch.float32)
    scales = scale.to(torch.float32).reshape(-1, n)
    offsets = None if offset is None else offset.to(torch.float32).reshape(-1, n)
    total = tokens.new_zeros((tokens.shape[0], n))
    for first, last in split_bounds(k, tile[2], splits):
        partial = torch.zeros_like(total) if splits > 1 else total
        while first < last:  # a part may begin within a group
            group = first // group_size if group_size else 0
            stop = min(last, (group + 1) * group_size) if group_size else last
            values = codes[first:stop]
            if offsets is not None:
                values = values + offsets[group]
            partial.add_((tokens[:, first:stop] @ values).mul_(scales[group]))
            first = stop
        if splits > 1:
            total.add_(partial)
    if bias is not None:
        total.add_(bias)
    return total.to(x.dtype).view(*x.shape[:-1], n)
