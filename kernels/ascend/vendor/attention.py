"""npu_fused_infer_attention_score in layout BNSD: grouped heads, a mask, a rotary part apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    PANGUQ,
    Broken,
    Size,
    names,
    not_contiguous,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.library import define_npu_op

NO_LIMIT = 2147483647
LARGEST_BATCH = 65536
LARGEST_HEADS = 256
LARGEST_HEAD_SIZE = 512
LARGEST_GROUP = 64
LATENT_HEAD_SIZE, ROPE_HEAD_SIZES, ROPE_SIZE = 512, (512, 128), 64
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
LARGEST_SEQUENCE = 20 * 1024 * 1024
LARGEST_DECODE_SEQUENCE = 262144
ALIGNMENT_BYTES = 16
CAUSAL_MASK = 2048
LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL = 2, 3
_DOCS = OP_PLUGIN.format("npu_fused_infer_attention_score")
_META = "torch_npu's Meta kernel for npu_fused_infer_attention_score"


def _contract(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = NO_LIMIT,
    next_tokens: int = NO_LIMIT,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    softmax_lse_flag: bool = False,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    **rest: object,
) -> Iterator[Broken]:
    for name, argument in rest.items():
        if argument is not None and not (isinstance(argument, int) and argument == 0):
            yield Broken(f"{name} must not be given", PANGUQ)
    if input_layout != "BNSD":
        yield Broken(f"input_layout must be 'BNSD', not {input_layout!r}", PANGUQ)
    if (pre_tokens, next_tokens) != (NO_LIMIT, NO_LIMIT):
        yield Broken(f"pre_tokens and next_tokens must be {NO_LIMIT}", PANGUQ)
    if inner_precise not in (0, 1, 2, 3):
        yield Broken(f"inner_precise must be 0, 1, 2 or 3, not {inner_precise}", _DOCS)
    yield from wrong_dtype("query", query, (torch.float16, torch.bfloat16), _DOCS)
    for what, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            # The page has int8 and int4 keys and values too, with scales of their own.
            found = names([tensor.dtype])
            yield Broken(
                f"{what} must have query's dtype {names([query.dtype])}, not {found}", PANGUQ
            )
    dims = [tensor.dim() for tensor in (query, key, value)]
    if dims != [4, 4, 4]:
        yield Broken(f"query, key and value must have 4 dimensions, not {dims}", _DOCS)
        return
    for what, tensor in (("query", query), ("key", key), ("value", value)):
        yield from not_contiguous(what, tensor, _DOCS)
    if query_rope is None and key_rope is None:
        yield from _heads(query, key, num_heads, num_key_value_heads)
    else:
        yield from _heads(query, key, num_heads, num_key_value_heads, max(LATENT_HEADS))
        yield from _rope(query, key, query_rope, key_rope)
        if surely(query.shape[3] == LATENT_HEAD_SIZE):
            yield from _latent(query, key, sparse_mode, softmax_lse_flag)
    batch, _, queries, head = query.shape
    yield from wrong_shape("key", key, [[batch, key.shape[1], key.shape[2], head]], _DOCS)
    yield from wrong_shape("value", value, [key.shape], _DOCS)
    if surely(batch > LARGEST_BATCH):
        yield Broken(f"the batch must be at most {LARGEST_BATCH}, not {batch}", _DOCS)
    aligned = ALIGNMENT_BYTES // 2
    if surely(head > LARGEST_HEAD_SIZE) or surely(head % aligned != 0):
        yield Broken(
            f"the head size must be a multiple of {aligned} of at most {LARGEST_HEAD_SIZE}, not"
            f" {head}",
            _DOCS,
        )
    longest = LARGEST_DECODE_SEQUENCE if surely(queries == 1) else LARGEST_SEQUENCE
    for what, size in (("queries", queries), ("keys", key.shape[2])):
        if surely(size > longest):
            yield Broken(f"the {what} must be at most {longest}, not {size}", _DOCS)
    yield from _mask(query, key, atten_mask, sparse_mode, query_rope is not None)


def _rope(
    query: Tensor, key: Tensor, query_rope: Tensor | None, key_rope: Tensor | None
) -> Iterator[Broken]:
    """What holds where the rotary part of queries and keys is given apart."""
    if query_rope is None or key_rope is None:
        yield Broken("query_rope and key_rope must be given together", _DOCS)
        return
    for what, rope, whole in (("query", query_rope, query), ("key", key_rope, key)):
        yield from wrong_dtype(f"{what}_rope", rope, (whole.dtype,), _DOCS)
        yield from not_contiguous(f"{what}_rope", rope, _DOCS)
        yield from wrong_shape(f"{what}_rope", rope, [[*whole.shape[:3], ROPE_SIZE]], _DOCS)
    if all(surely(query.shape[3] != size) for size in ROPE_HEAD_SIZES):
        sizes = " or ".join(map(str, ROPE_HEAD_SIZES))
        yield Broken(
            f"query's head size must be {sizes} beside a rope, not {query.shape[3]}", _DOCS
        )


def _latent(
    query: Tensor, key: Tensor, sparse_mode: int, softmax_lse_flag: bool
) -> Iterator[Broken]:
    """What holds of heads of 512, which share one latent as their key and value."""
    if all(surely(query.shape[1] != heads) for heads in LATENT_HEADS):
        heads = ", ".join(map(str, LATENT_HEADS))
        yield Broken(f"query must have one of {heads} heads, not {query.shape[1]}", _DOCS)
    if surely(key.shape[1] != 1):
        yield Broken(f"key must have 1 head, not {key.shape[1]}", _DOCS)
    if sparse_mode == LEFT_UP_CAUSAL:
        yield Broken("sparse_mode must be 0 or 3", _DOCS)
    if softmax_lse_flag:
        yield Broken("softmax_lse_flag must not be set", _DOCS)


def _heads(
    query: Tensor,
    key: Tensor,
    num_heads: int,
    num_key_value_heads: int,
    largest_group: int = LARGEST_GROUP,
) -> Iterator[Broken]:
    if num_heads <= 0:
        yield Broken(f"num_heads must be more than 0, not {num_heads}", _META)
        return
    of_keys = num_key_value_heads or num_heads
    for what, size, argument, given in (
        ("query", query.shape[1], "num_heads", num_heads),
        ("key", key.shape[1], "num_key_value_heads", of_keys),
    ):
        if surely(size != given):
            yield Broken(f"{argument} must be {what}'s {size} heads, not {given}", _DOCS)
        if given > LARGEST_HEADS:
            yield Broken(f"{argument} must be at most {LARGEST_HEADS}, not {given}", _DOCS)
    if of_keys < 0 or num_heads % of_keys or num_heads // of_keys > largest_group:
        yield Broken(
            f"num_heads must be a multiple of num_key_value_heads, at most {largest_group} times,"
            f" not {num_heads} for {of_keys}",
            _DOCS,
        )


def _mask(
    query: Tensor, key: Tensor, atten_mask: Tensor | None, sparse_mode: int, rope: bool
) -> Iterator[Broken]:
    if sparse_mode not in (0, LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL):
        yield Broken(f"sparse_mode must be 0, 2 or 3, not {sparse_mode}", PANGUQ)
        return
    if atten_mask is None:
        if sparse_mode:
            yield Broken(f"atten_mask must be given with sparse_mode {sparse_mode}", _DOCS)
        return
    yield from wrong_dtype("atten_mask", atten_mask, (torch.bool, torch.int8, torch.uint8), _DOCS)
    yield from not_contiguous("atten_mask", atten_mask, _DOCS)
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    shapes: list[Sequence[Size]]
    if sparse_mode:
        square = [CAUSAL_MASK, CAUSAL_MASK]
        shapes = [square, [1, *square], [1, 1, *square]]
    else:
        shapes = [[batch, 1, queries, keys], [1, 1, queries, keys], [1, queries, keys]]
        if not rope:
            # Two dimensions mean queries and keys, or, for one query, the batch and keys.
            shapes.append([batch if surely(queries == 1) else queries, keys])
    yield from wrong_shape("atten_mask", atten_mask, shapes, _DOCS)


def _fake(query: Tensor, value: Tensor, softmax_lse_flag: bool) -> tuple[Tensor, Tensor]:
    result = query.new_empty((*query.shape[:-1], value.shape[-1]))
    shape = (*query.shape[:-1], 1) if softmax_lse_flag else (0,)
    return result, query.new_empty(shape, dtype=torch.float32)


@define_npu_op(
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *,"
    " Tensor? pse_shift=None, Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None,"
    " SymInt[]? actual_seq_lengths_kv=None, Tensor? dequant_scale1=None,"
    " Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None,"
    " Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None,"
    " Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None,"
    " Tensor? value_antiquant_scale=None, Tensor? value_antiquant_offset=None,"
    " Tensor? block_table=None, Tensor? query_padding_size=None, Tensor? kv_padding_size=None,"
    " Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None,"
    " SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None,"
    " Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1.,"
    " int pre_tokens=2147483647, int next_tokens=2147483647,"
    ' str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0,'
    " int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0, int value_antiquant_mode=0,"
    " bool softmax_lse_flag=False) -> (Tensor, Tensor)",
    _fake,
    contract=_contract,
)
def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    sparse_mode: int = 0,
    softmax_lse_flag: bool = False,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    **rest: object,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key.T, without what the mask hides) @ value, and its log-sum-exp.

    query float16 or bfloat16 [batch, n, queries, d]; key and value [batch, n_kv, keys, d], each
    for n / n_kv query heads in a row; atten_mask True (or not 0) where a key is hidden: [batch or
    1, 1, queries, keys], [1, queries, keys] or [queries, keys]; for one query also [batch, keys].
    sparse_mode 2 hides the keys after the query counted from the first ones, 3 from the last ones,
    without reading the mask; for one query neither hides anything. query_rope
    [batch, n, queries, 64] and key_rope [batch, n_kv, keys, 64] are what else belongs to queries
    and keys of d = 128 or 512, of values not; for 512 all heads have one key. Returns query's dtype
    [batch, n, queries, d] and float32 [batch, n, queries, 1] ([0] without `softmax_lse_flag`).

    float32 with one rounding at the end; the formula is op-plugin's, which leaves rounding open,
    and the NPU rounds the weights to 16 bits. Where a query sees no key the result is the mean of
    all values, so that padding stays finite; CANN leaves such rows open, too.
    """
    if query_rope is not None and key_rope is not None:
        query, key = (torch.cat(parts, -1) for parts in ((query, query_rope), (key, key_rope)))
    batch, heads, queries, head = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    rows = heads // kv_heads * queries  # -1 would be ambiguous for a batch of none
    grouped = query.to(torch.float32).reshape(batch, kv_heads, rows, head)
    scores = (grouped @ key.to(torch.float32).transpose(2, 3)).mul_(scale)
    scores = scores.view(batch, heads, queries, keys)
    hidden = _hidden(queries, keys, atten_mask, sparse_mode)
    if hidden is not None:
        scores.masked_fill_(hidden, torch.finfo(torch.float32).min)
    weights = scores.softmax(dim=-1).view(batch, kv_heads, rows, keys)
    mixed = (weights @ value.to(torch.float32)).view(batch, heads, queries, value.shape[-1])
    result = mixed.to(query.dtype)
    lse = scores.logsumexp(dim=-1, keepdim=True) if softmax_lse_flag else torch.empty(0)
    return result, lse


def _hidden(queries: int, keys: int, atten_mask: Tensor | None, sparse_mode: int) -> Tensor | None:
    """True where a key is hidden, in a shape that broadcasts to [batch, n, queries, keys]."""
    if sparse_mode in (LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL):
        if queries == 1:
            return None
        first = keys - queries if sparse_mode == RIGHT_DOWN_CAUSAL else 0
        return torch.ones(queries, keys, dtype=torch.bool).triu(1 + first)
    if atten_mask is None:
        return None
    if atten_mask.dim() == 2 and queries == 1:
        atten_mask = atten_mask[:, None, None]
    return atten_mask.to(torch.bool)
