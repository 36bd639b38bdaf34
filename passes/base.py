"""What a pass is: a frozen dataclass whose fields are its options, and what it must declare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.ir.edit import label
from panguq.ir.interface import Interface
from panguq.ir.properties import Property as Property
from panguq.ir.weight_store import WeightStore


@dataclass(frozen=True)
class Skip:
    """A candidate that a pass left alone, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Site:
    """A region that an exact pass rewrote: outputs as a function of inputs, all by label."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A pass's own table: column names and rows, written as CSV into the dump."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


@dataclass
class PassResult:
    """What a pass did: how many rewrites, what it left alone, its tables, its exact sites."""

    changed: int = 0
    skipped: list[Skip] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    def skip(self, node: fx.Node, reason: str) -> None:
        """Note that this node was left alone."""
        self.skipped.append(Skip(label(node), reason))


Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)` by work that takes long."""


def no_progress(what: str, done: int, total: int) -> None:
    """The silent Progress."""


@dataclass
class PassContext:
    """What passes may read besides the graph.

    `batches` are calibration inputs by input name, as the front door prepares them; `probe` is
    one small such batch; `store` takes the tensors that passes make.
    """

    interface: Interface
    store: WeightStore
    batches: Sequence[dict[str, Tensor]] = ()
    probe: dict[str, Tensor] | None = None
    seed: int = 0
    progress: Progress = no_progress

    def generator(self) -> torch.Generator:
        """A fresh random generator with the compile's seed."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses; their docstring is Before / After."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[Property]] = frozenset()
    establishes: ClassVar[frozenset[Property]] = frozenset()
    breaks: ClassVar[frozenset[Property]] = frozenset()
    exact: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """What must hold before this pass, given its options and the passes before it."""
        return self.requires

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite `gm` in place."""
        raise NotImplementedError


def linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Every `aten.linear` whose weight is a stored tensor, in graph order."""
    return [
        n
        for n in gm.graph.nodes
        if n.target is torch.ops.aten.linear.default and n.args[1].op == "get_attr"
    ]


def labels(nodes: Iterable[fx.Node]) -> str:
    """Labels joined for a message."""
    return ", ".join(label(n) for n in nodes)
