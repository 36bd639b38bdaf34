"""From what a user passes to what a graph takes, refusing what the graph cannot serve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from panguq.errors import InputError
from panguq.ir.call_arguments import calls
from panguq.ir.interface import Interface
from panguq.ir.node_meta import meta_of
from panguq.ir.text.size_expression import evaluate_size, names_in
from panguq.ir.text.value_types import DTYPES

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_module_inputs(interface: Interface, inputs: Sequence[Tensor]) -> None:
    """Raise InputError unless these are the inputs, with sizes that the trace holds for."""
    if len(inputs) != len(interface.inputs):
        raise InputError(
            f"{len(inputs)} inputs given, the module takes {len(interface.inputs)}",
            f"give {', '.join(interface.inputs)}",
        )
    sizes: dict[str, int] = {}
    for name, tensor in zip(interface.inputs, inputs, strict=True):
        shape = interface.input_shapes[name]
        if tensor.dim() != len(shape):
            raise InputError(f"input {name} has {tensor.dim()} dimensions, expected {len(shape)}")
        for size, wanted in zip(tensor.shape, shape, strict=True):
            sizes.setdefault(str(wanted), size)
    for name, (least, largest) in interface.size_limits.items():
        size = sizes.get(name, least)
        if size < least or (largest is not None and size > largest):
            raise InputError(
                f"size {name} is {size}, the trace holds for {least} to {largest or 'any size'}",
                "the module branches on this size; compile again with other example inputs",
            )
    for name, tensor in zip(interface.inputs, inputs, strict=True):
        shape = interface.input_shapes[name]
        for index, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
            known = all(part in sizes for part in names_in(str(wanted)))
            expected = evaluate_size(str(wanted), sizes) if known else size
            if size != expected:
                raise InputError(
                    f"dimension {index} of input {name} is {size}, the graph serves {expected}",
                    f"the traced shape is {list(shape)}; compile again with other example inputs",
                )


def check_input_dtypes(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Raise InputError for floats of another width than the graph computes in."""
    given = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, tensor in zip(given, inputs, strict=True):
        if "val" in node.meta:
            wanted = node.meta["val"].dtype
        else:  # a graph from a file
            wanted = DTYPES.get((meta_of(node).stored_type or "").partition("[")[0])
        if wanted is None or not wanted.is_floating_point or not tensor.is_floating_point():
            continue
        if tensor.dtype != wanted:
            raise InputError(
                f"input {node.target} is {tensor.dtype}, the graph takes {wanted}",
                f"convert it: x.to({wanted})",
            )


def takes_empty_mask(gm: fx.GraphModule) -> bool:
    """Whether only attention ops read the mask, so that an empty one may say "plain causal"."""
    mask = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.target == "attention_mask")
    attentions = ("panguq::attention", "panguq::latent_attention", "panguq_cpu::bfloat16_attention")
    return all(any(calls(user, op) for op in attentions) for user in mask.users)


def empty_past(interface: Interface, batch: int) -> list[Tensor]:
    """A cache that holds no token yet, in the order in which the graph takes it."""
    return [
        torch.zeros(
            batch, *(size or 0 for size in cached.sizes), dtype=getattr(torch, cached.dtype)
        )
        for cached in interface.cached_tensors()
    ]


def past_length(interface: Interface, past: Sequence[Tensor]) -> int:
    """How many tokens a cache holds: a model without any key cannot say, and is not traced."""
    pairs = zip(interface.cached_tensors(), past, strict=True)
    return next((int(tensor.shape[2]) for cached, tensor in pairs if cached.grows), 0)


def check_ids(interface: Interface, input_ids: Tensor) -> Tensor:
    """Token ids as int64 `[batch, seq]`. Raises InputError that says what is wrong with them."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in INTEGERS:
        given = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise InputError(f"input_ids are {given}", "give token ids, an integer tensor [batch, seq]")
    if input_ids.dim() != 2 or min(input_ids.shape) < 1:
        raise InputError(
            f"input_ids have shape {list(input_ids.shape)}",
            "give [batch, seq] with at least one sequence and one token",
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or (interface.vocab_size is not None and high >= interface.vocab_size):
        raise InputError(
            f"token ids lie in [{low}, {high}], the vocabulary is [0, {interface.vocab_size})",
            "the text was tokenized with another model's tokenizer",
        )
    return input_ids.long()


def prepare(
    interface: Interface,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past: Sequence[Tensor] = (),
    logits_to_keep: int | Tensor = 0,
    empty_mask: bool = False,
    tokens: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """The graph's inputs by name.

    `attention_mask` is `[batch, past + seq]`, 1 where a token is real, and may be left out;
    `position_ids` `[batch, seq]` default to counting from the past on. With `empty_mask` a plain
    causal mask is passed as a tensor without elements. With `tokens` the inputs are those of a part
    of the call, the new tokens from the first number up to the second, after those before them; of
    the logits that are wanted these are the part's, or its last ones if none of them is wanted.
    Raises InputError for sizes that the graph cannot serve.
    """
    input_ids = check_ids(interface, input_ids)
    batch, seq = input_ids.shape
    past = list(past) or empty_past(interface, batch)
    _check_past(interface, past, batch)
    length = past_length(interface, past)
    total = length + seq
    if interface.max_positions is not None and total > interface.max_positions:
        raise InputError(
            f"{length} past and {seq} new tokens are more than the model's "
            f"{interface.max_positions} positions{_reason(interface)}",
            "shorten the prompt, or generate fewer tokens",
        )
    real = real_tokens(attention_mask, batch, total)
    if position_ids is None:
        position_ids = _positions(interface, real, length, batch, seq)
    _check_positions(interface, position_ids, batch, seq)
    wanted = kept_positions(logits_to_keep, seq)
    start, stop = tokens or (0, seq)
    if stop - start < seq:
        wanted = wanted[(wanted >= start) & (wanted < stop)] - start
        if not wanted.numel():
            wanted = torch.tensor([stop - start - 1])
        real = None if real is None else real[:, : length + stop]
    inputs = {
        "input_ids": input_ids[:, start:stop],
        "attention_mask": _mask(interface, real, length + start, stop - start, batch, empty_mask),
        "position_ids": position_ids.expand(batch, seq)[:, start:stop],
        "logit_positions": wanted,
    }
    inputs.update(zip(interface.inputs[4:], past, strict=True))
    return inputs


def _check_past(interface: Interface, past: Sequence[Tensor], batch: int) -> None:
    expected = interface.cached_tensors()
    if len(past) != len(expected):
        raise InputError(
            f"the cache holds {len(past)} tensors, the model needs {len(expected)}",
            "pass back the past_key_values that this model returned",
        )
    length = past_length(interface, past)
    for index, (cached, tensor) in enumerate(zip(expected, past, strict=True)):
        wanted = (batch, *(length if size is None else size for size in cached.sizes))
        if tuple(tensor.shape) != wanted:
            raise InputError(
                f"cache tensor {index} has shape {list(tensor.shape)}, expected {list(wanted)}",
                "the cache belongs to another batch or another model",
            )
        if tensor.dtype != getattr(torch, cached.dtype):
            raise InputError(
                f"cache tensor {index} is {tensor.dtype}, expected torch.{cached.dtype}",
                "the cache belongs to a model that was compiled with another recipe or dtype",
            )


def real_tokens(attention_mask: Tensor | None, batch: int, total: int) -> Tensor | None:
    """Boolean `[batch, total]`, None where all tokens are real. Raises InputError otherwise."""
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (batch, total):
        raise InputError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected {[batch, total]}",
            "give one entry for every past and new token, 1 where the token is real",
        )
    real = attention_mask.bool()
    if not torch.equal(real.to(attention_mask.dtype), attention_mask):
        raise InputError(
            f"attention_mask holds other values than 0 and 1, such as {_other(attention_mask)}",
            "give 1 where the token is real and 0 where it is padding; a mask that is added to "
            "scores (0 and a large negative number) is not taken",
        )
    return None if bool(real.all()) else real


def _other(mask: Tensor) -> float:
    return float(mask[(mask != 0) & (mask != 1)][0])


def _check_positions(interface: Interface, positions: Tensor, batch: int, seq: int) -> None:
    if tuple(positions.shape) not in ((batch, seq), (1, seq)):
        raise InputError(
            f"position_ids have shape {list(positions.shape)}, expected {[batch, seq]}",
            "give one position for every new token, or leave them out",
        )
    if positions.dtype not in INTEGERS:
        raise InputError(f"position_ids are {positions.dtype}", "give integers")
    if interface.max_positions is None:
        return
    least = -1 if interface.positions_from_mask else 0
    if int(positions.min()) < least:
        raise InputError(
            f"position_ids go down to {int(positions.min())}, the model's table begins at {least}"
        )
    if int(positions.max()) >= interface.max_positions:
        raise InputError(
            f"position_ids go up to {int(positions.max())}, the model serves "
            f"{interface.max_positions} positions{_reason(interface)}"
        )


def _reason(interface: Interface) -> str:
    return f" ({interface.max_positions_reason})" if interface.max_positions_reason else ""


def _positions(
    interface: Interface, real: Tensor | None, past: int, batch: int, seq: int
) -> Tensor:
    if real is not None and interface.positions_from_mask:
        return (real.long().cumsum(1) * real - 1)[:, past:]
    return torch.arange(past, past + seq).expand(batch, seq)


def _mask(
    interface: Interface, real: Tensor | None, past: int, seq: int, batch: int, empty_mask: bool
) -> Tensor:
    """Boolean `[batch, 1, seq, past + seq]`: each token attends to the real ones up to itself.

    A token before all real ones, which is padding, attends to one key: a row without any True would
    give NaN. It is itself, or a neighbour where layers keep states: these take a token for real
    that attends to itself.
    """
    if real is None and empty_mask:
        return torch.empty(0, dtype=torch.bool)
    total = past + seq
    causal = torch.ones(seq, total, dtype=torch.bool).tril(past)
    if real is None:
        return causal.expand(batch, 1, seq, total)
    mask = causal & real[:, None, None, :]
    one = torch.arange(past, total)
    if total > 1 and any(layer.states for layer in interface.cache):
        one = torch.where(one + 1 < total, one + 1, one - 1)
    single = torch.nn.functional.one_hot(one, total).bool()
    return mask | (single & ~mask.any(-1, keepdim=True))


def joined_logits(
    parts: Sequence[Tensor], tokens: Sequence[tuple[int, int]], logits_to_keep: int | Tensor
) -> Tensor:
    """The logits `[batch, kept, vocab]` of a call that ran in parts, each given `tokens`, in the
    order in which they were asked for."""
    wanted = kept_positions(logits_to_keep, tokens[-1][1])
    found, places = [], []
    for part, (start, stop) in zip(parts, tokens, strict=True):
        place = ((wanted >= start) & (wanted < stop)).nonzero().flatten()
        if place.numel():
            found.append(part)
            places.append(place)
    return torch.cat(found, dim=1)[:, torch.cat(places).argsort()]


def kept_positions(logits_to_keep: int | Tensor, seq: int) -> Tensor:
    """The positions among `seq` new tokens whose logits are wanted, int64, none below 0: the last
    `logits_to_keep`, 0 for all, or these. Raises InputError for others."""
    if isinstance(logits_to_keep, Tensor):
        whole = logits_to_keep.dim() == 1 and logits_to_keep.dtype in INTEGERS
        if not whole or any(not -seq <= at < seq for at in logits_to_keep.tolist()):
            raise InputError(
                f"logits_to_keep is {logits_to_keep.tolist()}, there are {seq} new tokens",
                "give a count, or a 1-D tensor of positions among them",
            )
        return logits_to_keep.long().cpu().remainder(seq)
    if not logits_to_keep >= 0:
        raise InputError(f"logits_to_keep is {logits_to_keep}", "give 0 for all, or a count")
    return torch.arange(max(seq - logits_to_keep, 0) if logits_to_keep else 0, seq)
