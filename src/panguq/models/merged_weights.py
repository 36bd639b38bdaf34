"""Weights that are stored in parts and merged while a model is loaded: into files, not memory.

Mixtures of experts are published with a tensor for each expert, and computed with one of all of
them. transformers stacks the experts and joins what belongs together, gate and up projection; in
memory that is all experts of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from panguq.errors import StorageError
from panguq.tensors.weight_store import WeightStore


class MergedInFiles(TorchFunctionMode):
    """In this block, `torch.stack` and `torch.cat` put what they make on a CPU into `store`.

    Values, shape and dtype are the same; the parts are copied one after another, so that memory
    holds none of them. Only calls of the thread that entered the block count. Where the disk is
    full, the block ends with that StorageError, whatever else was made of it within.
    """

    def __init__(self, store: WeightStore) -> None:
        super().__init__()
        self.store = store
        self._refused: StorageError | None = None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._refused is not None:
            raise self._refused

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.stack, torch.cat) and "out" not in kwargs:
            return self._joined(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _joined(
        self, join: Callable[..., Tensor], tensors: Sequence[Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return join(tensors, *args, **kwargs)
        forms = [torch.empty_like(tensor, device="meta") for tensor in tensors]
        form = join(forms, *args, **kwargs)  # which refuses what cannot be joined
        try:
            whole = self.store.empty(form.shape, form.dtype)
        except StorageError as error:
            self._refused = error
            raise
        return join(tensors, *args, **kwargs, out=whole)
