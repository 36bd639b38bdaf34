"""A checkpoint's weights into transformers' class: each in its place, or an error that says."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from panguq.errors import InputError, StorageError
from panguq.models.architectures import model_class
from panguq.models.checkpoint_files import CONFIG, StoredTensor, open_tensors, refuse_unweighted
from panguq.models.config import first_lines
from panguq.models.merged_weights import MergedInFiles
from panguq.models.packed_floats import PackedFloats
from panguq.models.packed_integers import PackedIntegers
from panguq.tensors.dtypes import dtype_name
from panguq.tensors.weight_store import WeightStore

logger = logging.getLogger("panguq")

_COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias)$")
"""Buffers of older checkpoints, which models compute anew."""


def load_weights(
    folder: Path,
    config: Any,
    tensors: list[StoredTensor],
    dtype: torch.dtype,
    packed: PackedFloats | PackedIntegers | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """The model of `config` with these tensors, memory-mapped where they are stored as `dtype`,
    and the names of those that it does not use. Experts that are stored one by one are merged in
    nameless files (`TMPDIR`), see `merged_weights`.

    `packed`: how some of the weights are stored that are no ordinary floats.

    Only the files of `tensors` are read. Raises StorageError, naming the weight, for one that is
    missing or of another shape; InputError for one that belongs to a module which has no place for
    it, such as a bias: another function would be computed without it.
    """
    kind, config = model_class(config, folder)
    state = open_tensors(tensors)
    if packed is not None:
        state = packed.unpack(tensors, state, WeightStore())
        tensors = packed.plain(tensors)
    try:
        with _quiet_transformers(), MergedInFiles(WeightStore()):
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # refused below, with names
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"{folder}: the weights do not fit {CONFIG}: {first_lines(error)}", _OTHER
        ) from error
    _refuse_other_shapes(folder, info["mismatched_keys"])
    unexpected = sorted(info["unexpected_keys"])
    _refuse_missing(folder, sorted(info["missing_keys"]), unexpected)
    used = dict(model.named_parameters())
    refuse_unweighted(tensor for tensor in tensors if tensor.name in used)
    _check_dtypes(folder, tensors, state, used, dtype)
    _refuse_homeless(folder, model, unexpected)
    _note_tied(folder, model)
    return model, tuple(_unused(model, unexpected, state))


def name_groups(model: nn.Module, names: Iterable[str]) -> str:
    """The names in groups: by the first part of each that `model` has no module for."""
    modules = {path for path, _ in model.named_modules()}
    groups: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        known = max(i for i in range(len(parts)) if ".".join(parts[:i]) in modules)
        end = known + 1
        groups[".".join(parts[:end]) + (".*" if end < len(parts) else "")] += 1
    listed = [f"{group} ({count})" if count > 1 else group for group, count in groups.items()]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


# --- what does not fit --------------------------------------------------------------------------


def _refuse_other_shapes(folder: Path, mismatched: Iterable[Any]) -> None:
    wrong = sorted(mismatched, key=lambda entry: ("embed" not in entry[0], entry[0]))
    if not wrong:
        return
    listed = "; ".join(
        f"{n} is {list(stored)} and not {list(asked)}" for n, stored, asked in wrong[:3]
    )
    raise StorageError(
        f"{folder}: {len(wrong)} weights do not fit {CONFIG}: {listed}",
        f"if the vocabulary was resized, set vocab_size in {CONFIG} to the rows that are stored; "
        f"else {_OTHER}",
    )


def _refuse_missing(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    """Refuse what transformers would make up: it would go on with random numbers."""
    if not missing:
        return
    message = f"{folder}: {len(missing)} weights are missing: {', '.join(missing[:4])}"
    hint = "the checkpoint is incomplete; download it again"
    if unexpected:
        message += f"; there are {', '.join(unexpected[:4])} instead"
        prefix = _prefix(missing, unexpected)
        if prefix:
            hint = (
                f"the names start with {prefix}, which a wrapper put there (torch.compile, "
                "DataParallel, a larger model); save the inner model, or rename the weights"
            )
    raise StorageError(message, hint)


def _prefix(missing: list[str], unexpected: list[str]) -> str:
    """What stands in front of the names in the checkpoint; empty if nothing does."""
    found = next((name for name in unexpected if name.endswith(f".{missing[0]}")), "")
    return found.removesuffix(missing[0])


def _refuse_homeless(folder: Path, model: nn.Module, unexpected: list[str]) -> None:
    """Refuse a bias, say, of a module that has none."""
    owners = {path for path, module in model.named_modules() if module._parameters}
    found = [name for name in unexpected if name.rpartition(".")[0] in owners]
    if found:
        raise InputError(
            f"{folder}: {len(found)} weights have no place in {type(model).__name__}: "
            f"{', '.join(found[:4])}",
            f"{CONFIG} may say otherwise than the weights (attention_bias, mlp_bias), or the model "
            "needs code of its own, which is not run",
        )


def _check_dtypes(
    folder: Path,
    tensors: list[StoredTensor],
    state: Mapping[str, Tensor],
    used: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Say which weights were cast, and refuse those that do not fit the others' dtype."""
    cast = [
        tensor
        for tensor in tensors
        if tensor.name in used and state[tensor.name].dtype != used[tensor.name].dtype == dtype
    ]
    for tensor in cast:
        if not used[tensor.name].isfinite().all() and state[tensor.name].isfinite().all():
            raise StorageError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.dtype} and does not fit "
                f"{dtype}, in which most weights are stored",
                "convert the checkpoint to one dtype that holds all, such as bfloat16",
            )
    if cast:
        counts = Counter(tensor.dtype for tensor in cast)
        logger.warning(
            "%s: most weights are stored as %s, and all are loaded so; cast to it: %s (%s%s)",
            folder, dtype_name(dtype),
            ", ".join(f"{count} of {name}" for name, count in counts.items()),
            ", ".join(tensor.name for tensor in cast[:3]), ", …" if len(cast) > 3 else "",
        )  # fmt: skip


# --- what is there beside -----------------------------------------------------------------------


def _unused(model: nn.Module, unexpected: list[str], state: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of the checkpoint that the model has no use for, those too that its class ignores
    without a word, as DeepSeek's does with the layers that predict further tokens."""
    patterns: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    modules = {path for path, _ in model.named_modules()}
    taken = model.state_dict().keys()
    for name in sorted({*unexpected, *(state.keys() - taken)}):
        owned = name.rpartition(".")[0] in modules  # a buffer that its module computes anew
        ignored = not owned and any(re.search(pattern, name) for pattern in patterns)
        if (name in unexpected or ignored) and not _COMPUTED.search(name):
            yield name


def _note_tied(folder: Path, model: Any) -> None:
    """Let the configuration say whether the logits read the embedding's own weights."""
    head = model.get_output_embeddings()
    table: Any = None if head is None else model.get_input_embeddings()
    if table is None or not hasattr(model.config, "tie_word_embeddings"):
        return
    tied = head.weight is table.weight
    if model.config.tie_word_embeddings and not tied:
        logger.warning(
            "%s: %s says that the embedding serves for the logits too (tie_word_embeddings), but "
            "another weight is stored for them, which is used",
            folder, CONFIG,
        )  # fmt: skip
    model.config.tie_word_embeddings = tied


# --- transformers -------------------------------------------------------------------------------


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' table of what did not fit: it is said, or refused, here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_OTHER = "the checkpoint is damaged or belongs to another config; download it again"
