"""What a token's experts gave, weighted and added: npu_moe_token_unpermute and
npu_moe_finalize_routing, which differ in what they add up in."""

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

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_K = 512
COLUMNS, ROWS = 0, 2  # drop_pad_mode: choice j of token i stands at j * tokens + i, or i * k + j
_UNPERMUTE = "aclnnMoeTokenUnpermute"
_DOCS = OP_PLUGIN.format("npu_moe_finalize_routing")
_ACLNN = "aclnnMoeFinalizeRoutingV2"


def _unpermute_contract(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> Iterator[Broken]:
    if padded_mode:
        yield Broken("padded_mode must be False", _UNPERMUTE)
    yield from not_given({"restore_shape": restore_shape}, PANGUQ)
    yield from wrong_dtype("permuted_tokens", permuted_tokens, FLOATS, _UNPERMUTE)
    yield from wrong_dtype("sorted_indices", sorted_indices, (torch.int32,), _UNPERMUTE)
    yield from wrong_dtype("probs", probs, FLOATS, _UNPERMUTE)
    if permuted_tokens.dim() != 2 or sorted_indices.dim() != 1:
        yield Broken(
            "permuted_tokens and sorted_indices must have 2 dimensions and 1, not"
            f" {permuted_tokens.dim()} and {sorted_indices.dim()}",
            _UNPERMUTE,
        )
        return
    if surely(permuted_tokens.shape[0] != sorted_indices.shape[0]):
        yield Broken(
            f"sorted_indices must have permuted_tokens' {permuted_tokens.shape[0]} rows, not"
            f" {sorted_indices.shape[0]}",
            _UNPERMUTE,
        )
    if probs is None:
        return
    if probs.dim() != 2:
        yield Broken(f"probs must have 2 dimensions, not {probs.dim()}", _UNPERMUTE)
        return
    if surely(probs.shape[1] > LARGEST_K):
        yield Broken(
            f"probs may have at most {LARGEST_K} columns, not {probs.shape[1]}", _UNPERMUTE
        )
    if surely(probs.shape[0] * probs.shape[1] != sorted_indices.shape[0]):
        yield Broken(
            f"probs must have one element for each of {sorted_indices.shape[0]} indices, not shape"
            f" {list(probs.shape)}",
            _UNPERMUTE,
        )


def _unpermute_fake(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None
) -> Tensor:
    k = 1 if probs is None else probs.shape[1]
    return permuted_tokens.new_empty((sorted_indices.shape[0] // k, permuted_tokens.shape[1]))


@define_npu_op(
    "npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None,"
    " bool padded_mode=False, int[]? restore_shape=None) -> Tensor",
    _unpermute_fake,
    contract=_unpermute_contract,
)
def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """sum_j probs[i, j] * permuted_tokens[sorted_indices[i * k + j]], `[tokens, h]`.

    permuted_tokens float [tokens * k, h]; sorted_indices int32 [tokens * k], the row_idx of
    npu_moe_init_routing_v2 (type 0); probs float [tokens, k], of any float dtype; without them k
    is 1. Products and the sum, in the order of j, are float32, rounded once (CANN's kernel).
    """
    k = 1 if probs is None else probs.shape[1]
    rows = permuted_tokens.to(torch.float32)[sorted_indices.view(-1, k).to(torch.int64)]
    if probs is not None:
        rows = rows * probs.to(torch.float32).unsqueeze(-1)
    return _added(rows).to(permuted_tokens.dtype)


def _added(rows: Tensor) -> Tensor:
    """The sum of `[tokens, k, h]` over k, one after the other, in its own dtype."""
    total = rows[:, 0]
    for j in range(1, rows.shape[1]):
        total = total + rows[:, j]
    return total


def _finalize_contract(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None,
    k: int | None,
) -> Iterator[Broken]:
    rows, places = expanded_permuted_rows, expanded_src_to_dst_row
    yield from not_given({"bias": bias, "export_for_source_row": export_for_source_row}, PANGUQ)
    if k != 1:
        yield Broken(f"k must be 1, its default, not {k}: it needs a later aclnn function", _DOCS)
    if drop_pad_mode not in (COLUMNS, ROWS):
        yield Broken(f"drop_pad_mode must be {COLUMNS} or {ROWS}, not {drop_pad_mode}", PANGUQ)
    yield from wrong_dtype("expanded_permuted_rows", rows, FLOATS, _DOCS)
    yield from wrong_dtype("expanded_src_to_dst_row", places, (torch.int32,), _DOCS)
    if rows.dim() != 2 or places.dim() != 1:
        yield Broken(
            "expanded_permuted_rows and expanded_src_to_dst_row must have 2 dimensions and 1, not"
            f" {rows.dim()} and {places.dim()}",
            _DOCS,
        )
        return
    if surely(rows.shape[0] != places.shape[0]):
        yield Broken(
            f"expanded_src_to_dst_row must have one element for each of {rows.shape[0]} rows, not"
            f" {places.shape[0]}",
            _DOCS,
        )
    tokens = rows.shape[0]
    if scales is not None:
        wide = (torch.float32,) if rows.dtype == torch.bfloat16 else ()
        yield from wrong_dtype("scales", scales, (rows.dtype, *wide), _ACLNN)
        if scales.dim() != 2 or surely(scales.shape[0] * scales.shape[1] != places.shape[0]):
            yield Broken(
                f"scales must be [tokens, k] for {places.shape[0]} rows, not {list(scales.shape)}",
                _DOCS,
            )
            return
        tokens = scales.shape[0]
    if skip2 is not None and skip1 is None:
        yield Broken("skip2 must not be given without skip1", _DOCS)
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        yield from wrong_dtype(name, skip, (rows.dtype,), _DOCS)
        yield from wrong_shape(name, skip, [[tokens, rows.shape[1]]], _DOCS)


def _finalize_fake(
    expanded_permuted_rows: Tensor, scales: Tensor | None, expanded_src_to_dst_row: Tensor
) -> Tensor:
    tokens = expanded_src_to_dst_row.shape[0] if scales is None else scales.shape[0]
    return expanded_permuted_rows.new_empty((tokens, expanded_permuted_rows.shape[1]))


@define_npu_op(
    "npu_moe_finalize_routing(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2,"
    " Tensor? bias, Tensor? scales, Tensor expanded_src_to_dst_row,"
    " Tensor? export_for_source_row, int? drop_pad_mode=0, int? k=1) -> Tensor",
    _finalize_fake,
    contract=_finalize_contract,
)
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """skip1 + skip2 + sum_j scales[i, j] * rows[index(i, j)], `[tokens, h]` in the rows' dtype.

    rows float [tokens * k, h]; scales float [tokens, k] (k is 1 without); skips of the result's
    shape; expanded_src_to_dst_row int32 [tokens * k], where index(i, j) stands at j * tokens + i
    (`drop_pad_mode` 0, npu_moe_init_routing) or i * k + j (2, its v2 with row_idx_type 0).

    float32 and bfloat16 rows are added up in float32, in the order of j, and rounded once;
    float16 ones in float16, so that every step rounds (CANN's kernel). The page leaves open where
    the skips come in; here they come first.
    """
    wide = torch.float16 if expanded_permuted_rows.dtype == torch.float16 else torch.float32
    choices = 1 if scales is None else scales.shape[1]
    index = expanded_src_to_dst_row.to(torch.int64)
    index = index.view(choices, -1).t() if drop_pad_mode == COLUMNS else index.view(-1, choices)
    rows = expanded_permuted_rows.to(wide)[index]
    if scales is not None:
        rows = rows * scales.to(wide).unsqueeze(-1)
    skips = [skip.to(wide).unsqueeze(1) for skip in (skip1, skip2) if skip is not None]
    return _added(torch.cat((*skips, rows), dim=1)).to(expanded_permuted_rows.dtype)
