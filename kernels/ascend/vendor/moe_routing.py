"""npu_moe_init_routing_v2: the tokens of each expert brought together, once for each of its k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    PANGUQ,
    Broken,
    not_given,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.library import define_npu_op

NOT_QUANTIZED, DYNAMIC = -1, 1
GATHER, SCATTER = 0, 1
CUMULATIVE, COUNTS, KEY_VALUE = 0, 1, 2
LARGEST_EXPERTS = 10240
LARGEST_KEY_VALUE_EXPERTS = 5120
_DOCS = OP_PLUGIN.format("npu_moe_init_routing_v2")
_META = "torch_npu's Meta kernel for npu_moe_init_routing_v2"
_TORCHAIR = "torchair's converter; the host code may read beyond an empty one"
_HOST = "torch_npu's host code for npu_moe_init_routing_v2"
# For so many experts, and tokens of this size, op-plugin calls aclnnMoeInitRoutingV2 where rows are
# counted and not quantized. That function knows neither a scale nor an active_num below 0.
NOT_COUNTED = (128, 2048)


def unwritten(tensor: Tensor) -> Tensor:
    """A result's elements that an NPU leaves as they were: NaN, or 0, so that all runs agree."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


def _contract(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    quant_mode: int,
    active_expert_range: Sequence[int],
    row_idx_type: int,
    x_dtype: int | None,
) -> Iterator[Broken]:
    yield from not_given({"offset": offset, "x_dtype": x_dtype}, PANGUQ)
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    yield from wrong_dtype("x", x, [*dtypes, torch.int8], _DOCS)
    yield from wrong_dtype("expert_idx", expert_idx, (torch.int32,), _DOCS)
    if x.dim() != 2 or expert_idx.dim() != 2:
        yield Broken(
            f"x and expert_idx must have 2 dimensions, not {x.dim()} and {expert_idx.dim()}", _META
        )
        return
    if surely(x.shape[0] != expert_idx.shape[0]):
        yield Broken(
            f"expert_idx must have x's {x.shape[0]} rows, not {expert_idx.shape[0]}", _META
        )
    for name, value, legal, source in (
        ("drop_pad_mode", drop_pad_mode, (0,), PANGUQ),
        ("expert_tokens_num_type", expert_tokens_num_type, (CUMULATIVE, COUNTS, KEY_VALUE), _META),
        ("quant_mode", quant_mode, (NOT_QUANTIZED, DYNAMIC), PANGUQ),
        ("row_idx_type", row_idx_type, (GATHER, SCATTER), _META),
    ):
        if value not in legal:
            yield Broken(f"{name} must be {' or '.join(map(str, legal))}, not {value}", source)
    if active_num > 0 or expert_capacity > 0:
        yield Broken("active_num and expert_capacity must not be given: all rows are kept", PANGUQ)
    most = LARGEST_KEY_VALUE_EXPERTS if expert_tokens_num_type == KEY_VALUE else LARGEST_EXPERTS
    if not 1 <= expert_num <= most:
        yield Broken(f"expert_num must be from 1 to {most}, not {expert_num}", _DOCS)
        return
    if not active_expert_range:
        yield Broken("active_expert_range must be given, [0, expert_num] for all", _TORCHAIR)
    elif not _is_range(active_expert_range, expert_num):
        yield Broken(
            f"active_expert_range must be [first, end) within [0, {expert_num}], not"
            f" {list(active_expert_range)}",
            _DOCS,
        )
        return
    first, end = active_expert_range or (0, expert_num)
    yield from wrong_dtype("scale", scale, (torch.float32,), _DOCS)
    if quant_mode == NOT_QUANTIZED:
        yield from wrong_shape("scale", scale, [[x.shape[0]]], _META)
        if expert_tokens_num_type == COUNTS and (expert_num, x.shape[1]) == NOT_COUNTED:
            yield Broken(
                "expert_tokens_num_type must not be 1 for 128 experts and float or int8 rows of"
                " 2048: aclnnMoeInitRoutingV2 would be called",
                _HOST,
            )
    else:
        yield from wrong_shape("scale", scale, [[end - first, x.shape[1]], [1, x.shape[1]]], _META)
        if x.dtype == torch.int8:
            yield Broken("x must be float to be quantized, not int8", _DOCS)


def _is_range(given: Sequence[int], expert_num: int) -> bool:
    return len(given) == 2 and 0 <= given[0] < given[1] <= expert_num


def _fake(
    x: Tensor,
    expert_idx: Tensor,
    expert_num: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, k = expert_idx.shape
    rows = tokens * k
    first, end = active_expert_range or (0, expert_num)
    counts: tuple[int, ...] = ()
    if expert_tokens_num_flag:
        counts = (expert_num, 2) if expert_tokens_num_type == KEY_VALUE else (end - first,)
    return (
        x.new_empty((rows, x.shape[1]), dtype=x.dtype if quant_mode < 0 else torch.int8),
        x.new_empty((rows,), dtype=torch.int32),
        x.new_empty(counts, dtype=torch.int64),
        x.new_empty((rows,), dtype=torch.float32),
    )


@define_npu_op(
    "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, *, Tensor? scale=None,"
    " Tensor? offset=None, int active_num=-1, int expert_capacity=-1, int expert_num=-1,"
    " int drop_pad_mode=0, int expert_tokens_num_type=0, bool expert_tokens_num_flag=False,"
    " int quant_mode=-1, int[2] active_expert_range=[], int row_idx_type=0, int? x_dtype=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    contract=_contract,
)
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [tokens, h] and expert_idx int32 [tokens, k] -> (rows, row_idx, expert_tokens, row_scale).

    rows `[tokens * k, h]` are x's, sorted by expert; of one expert, by token. row_idx int32
    [tokens * k]: for choice j of token i, at i * k + j, its row (type 0) or, for each row, that
    place (type 1). Choices outside `active_expert_range` have no row: -1 in type 0; rows and
    places behind the last one are not written. expert_tokens int64, if flagged: of each active
    expert the end of its rows (type 0) or their number (1), or pairs of expert and number, those
    with rows first (2). row_scale float32 [tokens * k]: without quantization `scale` [tokens]
    carried along.

    `quant_mode` 1 makes int8 of rows * scale (float32, one row for all experts or one each):
    row_scale = max|row| / 127, and the quotient loses float16's lower bits before a half is
    rounded away from zero, as CANN's kernel has it; a row of zeros, which that divides by zero,
    gets codes of zero here. CANN takes neither more than 2^24 choices nor k beyond 512.
    """
    tokens, k = expert_idx.shape
    first, end = active_expert_range or (0, expert_num)
    experts = expert_idx.reshape(-1).to(torch.int64)
    active = (experts >= first) & (experts < end)
    places = experts.masked_fill(~active, end).sort(stable=True).indices
    count = int(active.sum())
    source = places // k
    row_idx = torch.full((tokens * k,), -1, dtype=torch.int32)
    if row_idx_type == GATHER:
        row_idx[places[:count]] = torch.arange(count, dtype=torch.int32)
    else:
        row_idx[:count] = places[:count].to(torch.int32)
    rows = x[source]
    if quant_mode == DYNAMIC:
        rows = rows.to(torch.float32)
        if scale is not None:
            of_row = experts[places].clamp(first, end - 1) - first
            rows = rows * (scale if scale.shape[0] == 1 else scale[of_row])
        rows, row_scale = _quantize(rows)
    else:
        row_scale = unwritten(torch.empty(tokens * k)) if scale is None else scale[source]
    unwritten(rows[count:])
    unwritten(row_scale[count:])
    expert_tokens = torch.zeros((), dtype=torch.int64)
    if expert_tokens_num_flag:
        numbers = experts[active].bincount(minlength=end)[first:end]
        expert_tokens = _listed(numbers, first, expert_num, expert_tokens_num_type)
    return rows, row_idx, expert_tokens, row_scale


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scales of float32 `[m, h]`, rounded as CANN's routing rounds."""
    scale = rows.abs().amax(-1) / 127
    quotient = (rows / scale.unsqueeze(-1)).nan_to_num_(0.0)
    # float16 has 13 bits of mantissa less than float32; what is cut off goes towards zero.
    halved = (quotient.view(torch.int32) & ~0x1FFF).view(torch.float32)
    codes = halved.abs().add_(0.5).floor_().copysign_(halved)
    return codes.to(torch.int8), scale


def _listed(numbers: Tensor, first: int, expert_num: int, kind: int) -> Tensor:
    """The numbers of rows of the active experts as `expert_tokens_num_type` wants them."""
    if kind == COUNTS:
        return numbers
    if kind == CUMULATIVE:
        return numbers.cumsum(0)
    filled = numbers.nonzero().flatten()
    pairs = torch.zeros((expert_num, 2), dtype=torch.int64)
    pairs[: len(filled)] = torch.stack((filled + first, numbers[filled]), dim=1)
    return pairs
