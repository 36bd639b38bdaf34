"""What a pass is: a frozen dataclass whose fields are its options, and what it must declare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, fx

from panguq.errors import InputError
from panguq.ir.edit import label
from panguq.ir.input_statistics import InputStatistics
from panguq.ir.interface import Interface
from panguq.ir.probe_sizes import SITE_PROBE_SIZES
from panguq.ir.properties import Property as Property
from panguq.ir.quant_spec import Scheme
from panguq.ir.run.sweep import Progress
from panguq.ir.views import ExpertLinear, Linear
from panguq.tensors.weight_store import Unit, WeightStore
from panguq.tensors.work_folder import Finished


@dataclass(frozen=True)
class Skip:
    """A candidate that a pass left alone, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Region:
    """A region that an exact pass rewrote: outputs as a function of inputs, all by label.

    `turned` maps the old value to the new one where the pass meant to change an input or output.
    `sizes` are those at which it is proved.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    turned: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=lambda: SITE_PROBE_SIZES)


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
    sites: list[Region] = field(default_factory=list)

    def skip(self, node: fx.Node, reason: str) -> None:
        """Note that this node was left alone."""
        self.skipped.append(Skip(label(node), reason))


def no_progress(what: str, done: int, total: int) -> None:
    """The silent Progress."""


class MatmulRules(Protocol):
    """What the target says about a linear under a scheme."""

    def refusal(self, node: fx.Node, scheme: Scheme) -> str | None:
        """Why the target cannot run it; None if it can."""

    def predicted_us(self, node: fx.Node, scheme: Scheme) -> float:
        """Its predicted time, in microseconds over a mix of decoding steps and prompts."""


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that torch's generators cannot take."""
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"seed {seed:.3g}: it has more than 64 bits", "choose a smaller number")


@dataclass(frozen=True)
class ExpertTokens:
    """How many tokens of calibration a router sent to each expert, int64 `[experts]`, and the
    experts that had fewer than `least` and were calibrated on all of them instead."""

    routed: Tensor
    least: int

    @property
    def underfed(self) -> tuple[int, ...]:
        """Those experts."""
        return tuple(int(expert) for expert in (self.routed < self.least).nonzero()[:, 0])


@dataclass
class PassContext:
    """What passes may read besides the graph.

    `batches` are calibration inputs by input name, as the front door prepares them; `probe` is
    one small such batch; `store` takes the tensors that passes make; `matmul_rules` speak for the
    target, if there is one. `pass_label` names the pass that is running, by its place in the
    pipeline. `reference` is the float model's graph, which no pass changes. `allow_unmatched` says
    which globs over module paths may match nothing (`module_globs.py`). `expert_tokens` are how
    many tokens of calibration each expert met, by the label of the matmul. `written` of the
    batches, the last ones, are text that the model itself wrote. `warnings` are for the report.
    `following` is the pass that comes next. `statistics` of the values that matmuls read, by label,
    are what the pass before saw of the graph as it is now: a pass that has a sweep anyway may leave
    them here.
    """

    interface: Interface
    store: WeightStore
    batches: Sequence[dict[str, Tensor]] = ()
    probe: dict[str, Tensor] | None = None
    seed: int = 0
    progress: Progress = no_progress
    matmul_rules: MatmulRules | None = None
    pass_label: str = ""
    reference: fx.GraphModule | None = None
    allow_unmatched: bool | tuple[str, ...] = False
    expert_tokens: dict[str, ExpertTokens] = field(default_factory=dict)
    written: int = 0
    warnings: list[str] = field(default_factory=list)
    following: Pass | None = None
    statistics: Mapping[str, InputStatistics] | None = None

    def once(self, unit: str, compute: Callable[[], Finished]) -> Finished:
        """What `compute` yields for this unit of the running pass, its tensors in the store.

        Of several ranks (`panguq.ranks`) the first computes it alone, from all batches, and the
        others get it. A compile that goes on after it was killed gets what the first run had
        finished. So the result must follow only from the compile's inputs, and `unit` from the
        graph.
        """
        return self.store.once(f"{self.pass_label}/{unit}", compute)

    def together(self, unit: str, compute: Callable[[], Finished]) -> Finished:
        """As `once`, for a pass that ranks divide: all of them compute, each its own part."""
        return self.store.together(f"{self.pass_label}/{unit}", compute)

    def each(self, units: Sequence[Unit]) -> list[Finished]:
        """As `once` of several units that do not depend on one another; ranks divide them."""
        return self.store.each([replace(u, name=f"{self.pass_label}/{u.name}") for u in units])

    def require_batches(self) -> None:
        """Raises InputError if there is no calibration data; for passes that found use for it."""
        if not self.batches:
            raise InputError("there is no calibration data", "give calibration=, or a text file")

    def generator(self, number: int = 0) -> torch.Generator:
        """A fresh random generator with the compile's seed; another one for each number, such as a
        batch's, whose draws then do not depend on the batches before it."""
        seed = (self.seed + number) % 2**64 if number else self.seed
        return torch.Generator().manual_seed(seed)


GRADIENT_SWEEPS = 4.0


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses; their docstring is Before / After."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[Property]] = frozenset()
    establishes: ClassVar[frozenset[Property]] = frozenset()
    breaks: ClassVar[frozenset[Property]] = frozenset()
    exact: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    divided: ClassVar[bool] = False
    """Whether ranks divide its work; else each does all of it, or waits for the first."""

    @property
    def globs(self) -> tuple[str, ...]:
        """The globs over module paths among its options, each of which is to match a matmul."""
        return ()

    @property
    def given_schemes(self) -> tuple[Scheme, ...]:
        """The schemes among its options, which it may give matmuls."""
        return ()

    @property
    def has_static_activation(self) -> bool:
        """Whether the pass may give a matmul statically quantized activations."""
        activations = [scheme.activation for scheme in self.given_schemes]
        return any(spec is not None and not spec.dynamic for spec in activations)

    @property
    def divides_experts(self) -> bool:
        """Whether the pass may give the experts of one matmul schemes that differ."""
        return False

    @property
    def divides_outputs(self) -> bool:
        """Whether the pass may give tokens weights that differ between outputs of one matmul."""
        return False

    @property
    def sweeps(self) -> float:
        """About how many forward passes over the calibration data take as long as this pass does.

        One with a gradient counts `GRADIENT_SWEEPS`: forward, again by block, and backward.
        """
        return float(self.needs_calibration)

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """What must hold before this pass, given its options and the passes before it."""
        return self.requires

    def check_matmuls(self, gm: fx.GraphModule) -> None:
        """Raises RecipeError for a matmul that the pass cannot take with the scheme it has.

        Asked before any data is read, of a graph whose matmuls have schemes that stay.
        """

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite `gm` in place."""
        raise NotImplementedError


def matmuls(gm: fx.GraphModule) -> list[fx.Node]:
    """Every linear whose weight is a stored tensor, those of experts too, in graph order."""
    found = (Linear.match(node) for node in gm.graph.nodes)
    return [linear.node for linear in found if linear is not None and linear.is_stored]


def linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Those of the matmuls that have one weight `[n, k]`, as experts' do not."""
    return [node for node in matmuls(gm) if ExpertLinear.match(node) is None]


def labels(nodes: Iterable[fx.Node]) -> str:
    """Labels joined for a message."""
    return ", ".join(label(n) for n in nodes)
