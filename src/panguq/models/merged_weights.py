"""Weights that are stored in parts and merged while a model is loaded: into files, not memory.

Mixtures of experts are published with a tensor for each expert, and computed with one of all of
them. transformers stacks the experts and joins what belongs together, gate and up projection; in
memory that is all experts of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from panguq.errors import StorageError
from panguq.tensors.weight_store import WeightStore


@dataclass(frozen=True, eq=False)
class _Unfilled:
    """A stack whose parts are not copied yet."""

    whole: Tensor
    parts: tuple[Tensor, ...]
    dim: int

    @property
    def place(self) -> int:
        return self.whole.untyped_storage().data_ptr()

    def fill(self, into: Tensor) -> None:
        for index, part in enumerate(self.parts):
            into.select(self.dim, index).copy_(part)


class MergedInFiles(TorchFunctionMode):
    """In this block, `torch.stack` and `torch.cat` put what they make on a CPU into `store`.

    Values, shape and dtype are the same; the parts are copied one after another, so that memory
    holds none of them. A stack is filled when something reads it, or when two more were made, at
    the latest at the end of the block: stacks that are joined by `torch.cat` are copied once, into
    what that makes, and become views of it. Only calls of the thread that entered the block count.
    Where the disk is full, the block ends with that StorageError, whatever else was made of it
    within.
    """

    def __init__(self, store: WeightStore) -> None:
        super().__init__()
        self.store = store
        self._refused: StorageError | None = None
        self._unfilled: list[_Unfilled] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fill_all_but(0)
        if self._refused is not None:
            raise self._refused

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = not {"out", "axis"} & kwargs.keys()
        if func is torch.cat and plain:
            return self._concatenated(*args, **kwargs)
        self._fill_what_is_read((args, kwargs))
        if func is torch.stack and plain:
            return self._stacked(*args, **kwargs)
        return func(*args, **kwargs)

    def _stacked(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        whole = self._empty(torch.stack, tensors, dim)
        if whole is None:
            return torch.stack(list(tensors), dim)
        self._fill_all_but(1)
        self._unfilled.append(_Unfilled(whole, tuple(tensors), dim % whole.dim()))
        return whole

    def _concatenated(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        waiting = {id(one.whole): one for one in self._unfilled}
        joined = {id(tensor) for tensor in tensors}
        apart = len(joined) == len(tensors) and joined <= waiting.keys()
        if not apart:
            self._fill_what_is_read(tensors)
        whole = self._empty(torch.cat, tensors, dim)
        if whole is None or not apart:
            return torch.cat(list(tensors), dim, out=whole)
        start = 0
        for tensor in tensors:
            own = whole.narrow(dim, start, tensor.shape[dim])
            waiting[id(tensor)].fill(own)
            tensor.set_(own)  # type: ignore[call-overload]
            start += tensor.shape[dim]
        self._unfilled = [one for one in self._unfilled if id(one.whole) not in joined]
        return whole

    def _empty(
        self, join: Callable[..., Tensor], tensors: Sequence[Tensor], dim: int
    ) -> Tensor | None:
        """What `join` makes, to be filled; None for tensors that are not on a CPU."""
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        forms = [torch.empty_like(tensor, device="meta") for tensor in tensors]
        form = join(forms, dim)  # which refuses what cannot be joined
        try:
            return self.store.empty(form.shape, form.dtype)
        except StorageError as error:
            self._refused = error
            raise

    def _fill_all_but(self, newest: int) -> None:
        while len(self._unfilled) > newest:
            one = self._unfilled.pop(0)
            one.fill(one.whole)

    def _fill_what_is_read(self, values: Any) -> None:
        if not self._unfilled:
            return
        read = {
            leaf.untyped_storage().data_ptr()
            for leaf in pytree.tree_leaves(values)
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu"
        }
        for one in [one for one in self._unfilled if one.place in read]:
            self._unfilled.remove(one)
            one.fill(one.whole)
