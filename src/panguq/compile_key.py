"""Finished parts of a compile, and what makes two compiles the same so that they may share them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, fx

from panguq.ir.edit import clone, weights_of
from panguq.ir.text.printer import content_hash, print_graph
from panguq.ranks import ranks
from panguq.recipe import Recipe
from panguq.tensors.work_folder import WorkFolder

SAMPLED_PER_AXIS = 64
logger = logging.getLogger("panguq")


def compile_key(
    gm: fx.GraphModule,
    batches: Sequence[Mapping[str, Tensor]] | None,
    sampled: int,
    recipe: Recipe,
    target: str,
    seed: int,
) -> dict[str, str]:
    """Names and values of all that decides the bits of a compile's result.

    `gm` is the graph before anything was quantized; `batches` None if they follow from the rest,
    as the `sampled` ones do.
    """
    return {
        "panguq": version("panguq"),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "recipe": recipe.to_yaml(),
        "target": target,
        "seed": str(seed),
        "model": _model_hash(gm),
        "sampled sequences": str(sampled),
        "calibration data": "sampled" if batches is None else _data_hash(batches),
    }


def _data_hash(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in batch.items():
            digest.update(f"{name}{content_hash(tensor)}".encode())
    return digest.hexdigest()


def _model_hash(gm: fx.GraphModule) -> str:
    """Of the graph and some rows and columns of each weight: a large model is not read for it."""
    lines = (line.split("  # ")[0] for line in print_graph(gm).splitlines())  # without schemes
    digest = hashlib.sha256("\n".join(lines).encode())
    for name, tensor in weights_of(gm).items():
        steps = tuple(slice(None, None, max(size // SAMPLED_PER_AXIS, 1)) for size in tensor.shape)
        digest.update(f"{name}{content_hash(tensor[steps])}".encode())
    return digest.hexdigest()


class PassedChecks:
    """Checks of graphs that an earlier run of this compile has passed, and that it need not repeat.

    Each reads all weights: of a model larger than memory, a compile that goes on would read them
    from disk again and again before it does anything new. The key, which tells whether the earlier
    run was of this very compile, is known only after them. So they are put off, and `settle` makes
    them if it was not.
    """

    def __init__(self, units: WorkFolder | None) -> None:
        self._units = units
        self._known = {} if units is None else units.passed_checks
        self._passed: dict[str, float] = {}
        self._put_off: list[Callable[[], float]] = []
        self._is_settled = units is None

    def once(
        self, what: str, graphs: Sequence[fx.GraphModule], check: Callable[..., float]
    ) -> float:
        """What `check(*graphs)` returns, or did when it was passed for graphs of the same text.

        Of several ranks the first makes it; what it finds, the others raise with it.
        """
        if not ranks().is_first:
            return 0.0
        if self._is_settled:
            return check(*graphs)
        text = "\n".join([what, version("transformers"), *(print_graph(gm) for gm in graphs)])
        name = f"{what.partition(' ')[0]} {hashlib.sha256(text.encode()).hexdigest()}"
        if name in self._known:
            self._put_off.append(partial(check, *(clone(gm) for gm in graphs)))
            self._passed[name] = self._known[name]
        else:
            self._passed[name] = check(*graphs)
        return self._passed[name]

    def settle(self) -> None:
        """The folder now belongs to this compile: if it was another's, make what was put off."""
        self._is_settled = True
        if self._units is None:
            return
        if not self._units.passed_checks:
            for check in self._put_off:
                check()
        self._put_off.clear()
        self._units.note_checks(self._passed)


@contextmanager
def held_units(place: str | Path | WorkFolder | None) -> Iterator[WorkFolder | None]:
    """The folder of finished parts as this process's alone; one that the caller holds stays his.

    Of several ranks the first holds it, and the others have none.

    Raises StorageError for a folder that another compile holds, or that holds something else.
    """
    if place is None or isinstance(place, WorkFolder) or not ranks().is_first:
        yield place if isinstance(place, WorkFolder) else None
        return
    units = WorkFolder(Path(place))
    try:
        yield units
    finally:
        units.leave()


def open_units(
    units: WorkFolder | None,
    gm: fx.GraphModule,
    batches: Sequence[Mapping[str, Tensor]] | None,
    sampled: int,
    recipe: Recipe,
    target: str,
    seed: int,
) -> None:
    """Keep the parts of this very compile; those of another one go, and that is said."""
    if units is None:
        return
    changed = units.open_for(compile_key(gm, batches, sampled, recipe, target, seed))
    if changed:
        logger.warning(
            "%s holds the parts of another compile, so this one starts anew; different: %s",
            units.path,
            ", ".join(changed),
        )
