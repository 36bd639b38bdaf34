"""npu_rotary_mul: rotary position embedding of queries or keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    PANGUQ,
    Broken,
    Size,
    names,
    not_given,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.library import define_npu_op

SMALLEST_REFUSED_HEAD = 896
SMALLEST_REFUSED_BATCH = 1000
BLOCK_BYTES = 32
HEAD_THAT_NEED_NOT_ALIGN = 80
FEWEST_CORES = 20  # of an Atlas A2: 20 or 24
_DOCS = OP_PLUGIN.format("npu_rotary_mul")
_ACLNN = "aclnnRotaryPositionEmbedding"


def _contract(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None
) -> Iterator[Broken]:
    yield from not_given({"rotate": rotate}, PANGUQ)
    if rotary_mode not in ("half", "interleave"):
        yield Broken(f"rotary_mode must be 'half' or 'interleave', not {rotary_mode!r}", _DOCS)
    yield from wrong_dtype("input", input, (torch.float32, torch.float16, torch.bfloat16), _DOCS)
    for what, table in (("r1", r1), ("r2", r2)):
        if table.dtype != input.dtype:
            found = names([table.dtype])
            yield Broken(
                f"{what} must have input's dtype {names([input.dtype])}, not {found}", _ACLNN
            )
    if input.dim() not in (3, 4):
        yield Broken(f"input must have 3 or 4 dimensions, not {input.dim()}", _DOCS)
        return
    head = input.shape[-1]
    if surely(head % 2 != 0) or surely(head >= SMALLEST_REFUSED_HEAD):
        yield Broken(
            f"input's last size must be even and less than {SMALLEST_REFUSED_HEAD}, not {head}",
            _DOCS,
        )
    yield from wrong_shape("r2", r2, [r1.shape], _ACLNN)
    layouts = _layouts(input, interleave=rotary_mode == "interleave")
    readings = []
    for axes, shapes in layouts:
        if not [*wrong_shape("r1", r1, shapes, _DOCS)]:
            readings.append([*_sizes(input, *axes)])
    if not readings:
        yield from wrong_shape(
            "r1", r1, [shape for _, shapes in layouts for shape in shapes], _DOCS
        )
    # What the dimensions mean shows in r1's shape alone: one reading that is legal is enough.
    yield from min(readings, key=len, default=[])


_Layout = tuple[tuple[Size, Size, Size | None], list[list[Size]]]


def _layouts(input: Tensor, interleave: bool) -> list[_Layout]:
    """Each layout's batch, heads and (BNSD alone) sequence, and the shapes that r1 may have."""
    *sizes, d = input.shape
    if len(sizes) == 2:
        tokens, heads = sizes
        layouts: list[_Layout] = [((1, heads, None), [[tokens, 1, d], [tokens, heads, d]])]
    else:
        a, b, c = sizes
        layouts = [
            ((a, b, c), [[1, 1, c, d], [a, 1, c, d], [a, b, c, d]]),  # BNSD
            ((a, c, None), [[1, b, 1, d], [a, b, 1, d], [a, b, c, d]]),  # BSND
            ((b, c, None), [[a, 1, 1, d], [a, b, 1, d], [a, b, c, d]]),  # SBND
        ]
    return [(axes, shapes[:1]) for axes, shapes in layouts] if interleave else layouts


def _sizes(input: Tensor, batch: Size, heads: Size, sequence: Size | None) -> Iterator[Broken]:
    for what, size in (("batch", batch), ("heads", heads)):
        if surely(size >= SMALLEST_REFUSED_BATCH):
            yield Broken(
                f"input's {what} must be fewer than {SMALLEST_REFUSED_BATCH}, not {size}", _DOCS
            )
    if sequence is None:
        return
    head = input.shape[-1]
    if surely(head // 2 % (BLOCK_BYTES // input.element_size()) == 0):
        too_many = surely(batch * heads > sequence * 8)
        limit = "8 for each position"
    else:
        tokens = (sequence + FEWEST_CORES - 1) // FEWEST_CORES
        too_many = surely(head < HEAD_THAT_NEED_NOT_ALIGN) and surely(batch * heads * 2 > tokens)
        limit = f"half a position for each core with a head size of {head}"
    if too_many:
        yield Broken(
            f"batch times heads in layout BNSD must be at most {limit}, not {batch} * {heads} for"
            f" {sequence} positions",
            _ACLNN,
        )


def _fake(input: Tensor) -> Tensor:
    return input.new_empty(input.shape)


@define_npu_op(
    'npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half",'
    " Tensor? rotate=None) -> Tensor",
    _fake,
    contract=_contract,
)
def npu_rotary_mul(
    input: Tensor,
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
    rotate: Tensor | None = None,
) -> Tensor:
    """input * r1 + turned(input) * r2, where r1 holds cosines and r2 sines.

    input float [batch, heads, sequence, d], its like with sequence before heads or in front, or
    [tokens, heads, d]; r1 and r2 of its dtype, 1 where they are the same for all. turned(x) is
    cat(-x[d/2:], x[:d/2]) for "half"; for "interleave" each pair (a, b) becomes (-b, a). float32
    with one rounding at the end (op-plugin's page gives the formula and leaves that open).
    """
    x = input.to(torch.float32, memory_format=torch.contiguous_format)
    if rotary_mode == "half":
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).view(x.shape)
    return (x * r1.to(torch.float32)).add_(turned * r2.to(torch.float32)).to(input.dtype)
