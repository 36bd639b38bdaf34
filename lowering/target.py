"""What a graph can be compiled for: a machine, what its kernels take, and what they cost.

A target is an object. What panguq asks of one is a method or an attribute here; what a kind of
target answers stands in a folder of its own (`cpu/`, `ascend/`). Nothing else compares kinds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch._ops import OpOverload

from panguq.errors import LoweringError
from panguq.ir.number_format import Integer, NumberFormat
from panguq.ir.quant_spec import Scheme
from panguq.lowering.choice import DECODE_M, DECODE_STEPS, PREFILL_M, Choice, TokenMix
from panguq.lowering.measured import Measured
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Candidate, FormatOption, MatmulProblem, WeightFormat
from panguq.passes.pipeline.base import Pass
from panguq.suggest import did_you_mean
from panguq.tensors.weight_store import WeightStore

Floats = NDArray[np.float64]
Calls = Callable[[fx.Node, Choice], fx.Node]
"""Writes the chosen call in front of a matmul; its value takes the matmul's place."""


@dataclass(frozen=True)
class KernelCost:
    """An affine cost: `launch_us + weight bytes / gb_per_s + m·n·k / gmac_per_s`.

    `weight_bytes_per_weight` is what the kernel reads for each weight, once a call; `source` says
    where the numbers are from, as for `Constant`.
    """

    launch_us: float
    gb_per_s: float
    gmac_per_s: float
    weight_bytes_per_weight: float
    source: str = ""


@dataclass(frozen=True)
class Constant:
    """A number of a target. `source` names where it is published, or says "fitted to …"."""

    value: float
    unit: str
    source: str

    @property
    def fitted(self) -> bool:
        """Whether it was fitted to timings instead of looked up."""
        return self.source.startswith("fitted to ")


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call. `total_us` is the sum of the terms, of the `overlapped` ones only
    the largest; `how` names the tiling that it is the cost of."""

    total_us: float
    terms: dict[str, float]
    how: str = ""
    overlapped: tuple[str, ...] = ()

    @property
    def bound_by(self) -> str:
        """The overlapped term that decides."""
        return max(self.overlapped, key=lambda name: self.terms[name])


@dataclass(frozen=True)
class Peaks:
    """What bounds the nodes of a graph that are no matmuls: memory and 16-bit multiplications."""

    bytes_per_us: float
    macs_per_us: float


@dataclass(frozen=True)
class Target(ABC):
    """A machine to compile for. A subclass says at least `kind`, `candidates` and `calls`.

    `kernels` and `constants` are its numbers, plain data that a target file holds, too (see
    `target_files.py`): one affine cost a kernel, or constants from which costs are computed;
    `measured` are times of single calls, which are used as they are.
    """

    name: str
    kernels: Mapping[str, KernelCost] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()

    kernel_names: ClassVar[tuple[str, ...]] = ()
    """What `kernels` gives the cost of: all of them, and nothing else."""
    units: ClassVar[Mapping[str, str]] = {}
    """The unit of each of `constants`: all of them, and nothing else."""
    whole: ClassVar[tuple[str, ...]] = ()
    """Constants that are whole numbers."""
    float_dtype: ClassVar[torch.dtype | None] = None
    """What a model is cast to unless the user says; None: it keeps its own."""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """Where compiled models run. On a CPU all do: every op has a body there."""
    float_follows_machine: ClassVar[bool] = False
    """Whether float matmuls run in the type that the machine at hand multiplies fastest."""
    takes_empty_masks: ClassVar[bool] = True
    """Whether the lowered graph takes a mask without elements for plain causal attention."""
    takes_experts: ClassVar[bool] = False
    """Whether there are kernels for the matmuls of experts, in every scheme that it knows."""
    takes_mixed_experts: ClassVar[bool] = False
    """Whether these kernels take some of a layer's experts alone, so that schemes may differ."""
    lowers: ClassVar[bool] = True
    """Whether there are kernels, for which matmuls are lowered; else the fake-quant graph runs."""
    fits_schemes: ClassVar[bool] = False
    """Whether a scheme that no kernel takes is replaced by one of its `fallbacks`."""
    prepacking: ClassVar[tuple[OpOverload, ...]] = ()
    """Ops that make what a kernel reads of stored weights alone: run once, at loading."""
    terms: ClassVar[Mapping[str, str]] = {"call": "running the kernel"}
    """The terms of `cost` in their order, and what each is the time of, in words."""
    overlapped: ClassVar[tuple[str, ...]] = ()
    """Those of the terms that run at the same time."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What target files call this kind of target."""

    def __getitem__(self, constant: str) -> float:
        """The value of a constant."""
        return self.constants[constant].value

    # --- what may run -----------------------------------------------------------------------------

    def reads(self, number_format: NumberFormat) -> bool:
        """Whether there are kernels that read codes of this format; here, of integers alone."""
        return isinstance(number_format, Integer)

    @abstractmethod
    def candidates(self, problem: MatmulProblem, allow_float: bool = False) -> list[Candidate]:
        """All kernels that know the scheme, legal or not, and why those are not. Nothing of
        speed. With `allow_float` the float matmul is legal for a quantized scheme, too."""

    def fallbacks(self, scheme: Scheme) -> tuple[Scheme, ...]:
        """The schemes that take this one's place, in order, where no kernel takes a shape."""
        return ()

    @property
    def largest_n(self) -> int | None:
        """The most outputs that one call of a quantized matmul computes; None: any number."""
        return None

    def weight_formats(
        self, problem: MatmulProblem, option: FormatOption
    ) -> tuple[WeightFormat, ...]:
        """The memory formats of the weight that `option` allows; the first of equal ones wins."""
        return ("ND",)

    # --- what it costs ----------------------------------------------------------------------------

    def total_us(
        self,
        candidates: Sequence[Candidate],
        problem: MatmulProblem,
        tokens: NDArray[np.int64],
    ) -> Floats:
        """Microseconds `[candidates, tokens]` of legal candidates. A target that knows none says
        zero, and the first legal candidate is taken."""
        return np.zeros((len(candidates), len(tokens)))

    def cost(self, candidate: Candidate, problem: MatmulProblem) -> Cost:
        """The cost of a legal candidate by term, for the problem's m, which is a number."""
        assert problem.m is not None
        total = float(self.total_us([candidate], problem, np.array([problem.m]))[0, 0])
        return Cost(total, {"call": total})

    def select(
        self, problem: MatmulProblem, mix: TokenMix, allow_float: bool, hysteresis: float
    ) -> Choice:
        """The kernels of least cost; `select_kernel` says what the arguments mean.

        Here, one kernel for every m: the cheapest over 256 decoding steps and a prompt of 512
        tokens. Raises LoweringError if none is legal.
        """
        found = self.candidates(problem, allow_float)
        legal = self.legal(found, problem)
        costs = self.total_us(legal, problem, np.array([DECODE_M, PREFILL_M]))
        best = int((DECODE_STEPS * costs[:, 0] + costs[:, 1]).argmin())
        described = {
            c.kernel: f"{us[0]:.0f} us at m={DECODE_M}, {us[1]:.0f} us at m={PREFILL_M}"
            for c, us in zip(legal, costs, strict=True)
        }
        losers = [(c.kernel, c.refusal or described[c.kernel]) for c in found]
        kernel = legal[best].kernel
        return Choice(
            kernel=kernel,
            precision=problem.precision,
            few_tokens=0,
            losers=tuple(entry for entry in losers if entry[0] != kernel),
            decode_us=float(costs[best, 0]),
            prefill_us=float(costs[best, 1]),
            storage=legal[best].storage,
        )

    def legal(self, found: Sequence[Candidate], problem: MatmulProblem) -> list[Candidate]:
        """Those without a refusal. Raises LoweringError, with every refusal, if there are none."""
        legal = [c for c in found if c.refusal is None]
        if not legal:
            reasons = {f"{c.kernel}: {c.refusal}": None for c in found}
            raise LoweringError(
                f"no kernel of target {self.name} can run {problem.scheme.name} for "
                f"n={problem.n}, k={problem.k}: {'; '.join(reasons)}",
                "choose another scheme for this matmul in the recipe",
            )
        return legal

    @property
    def peaks(self) -> Peaks | None:
        """What a whole model's time is predicted with; None: it is not."""
        return None

    # --- what it becomes --------------------------------------------------------------------------

    def passes_before(self, options: AscendOptions) -> tuple[Pass, ...]:
        """What runs on the fake-quant graph before `lower-matmuls`."""
        return ()

    @abstractmethod
    def calls(self, gm: fx.GraphModule, store: WeightStore) -> Calls:
        """What writes the calls of one graph. Tensors that it makes go into `store`."""

    def passes_after(self, options: AscendOptions) -> tuple[Pass, ...]:
        """What runs after `lower-matmuls`."""
        return ()

    def notes(self, node: fx.Node, scheme: Scheme | None, predict: bool) -> dict[str, str]:
        """`panguq.kernel`, `panguq.predicted_us` and the like of a call that `calls` wrote, for
        people who read the graph in another format; nothing for other nodes."""
        return {}


def check_target(target: Target, source: str) -> Target:
    """The target itself. Raises LoweringError, naming `source` and the constant, if it is not
    complete or a number in it cannot be."""
    _check_names(target.constants, target.units, f"{source}: constants")
    for name, constant in target.constants.items():
        _check_number(constant.value, f"{source}: constants.{name}")
        if not constant.source:
            raise LoweringError(
                f"{source}: constants.{name}: has no source",
                "say where the number is from, or what it was fitted to",
            )
    for name in target.whole:
        if name in target.constants and target[name] != int(target[name]):
            raise LoweringError(f"{source}: constants.{name}: {target[name]} is not whole")
    _check_names(target.kernels, dict.fromkeys(target.kernel_names), f"{source}: kernels")
    for name, cost in target.kernels.items():
        where = f"{source}: kernels.{name}"
        for number in fields(cost):
            if number.name != "source":
                _check_number(getattr(cost, number.name), f"{where}.{number.name}")
        if not isinstance(cost.source, str) or not cost.source:
            raise LoweringError(
                f"{where}: has no source",
                "say what the numbers were fitted to; panguq tune writes such a file",
            )
    for place, row in enumerate(target.measured):
        for size in ("m", "n", "k", "us"):
            _check_number(getattr(row, size), f"{source}: measured[{place}].{size}")
    return target


def _check_names(given: Mapping[str, object], known: Mapping[str, object], where: str) -> None:
    for name in given:
        if name not in known:
            raise LoweringError(
                f"{where}: unknown name {name!r}", did_you_mean(name, known, "names")
            )
    missing = [name for name in known if name not in given]
    if missing:
        raise LoweringError(
            f"{where}.{missing[0]}: is missing",
            f"a target of this kind gives {', '.join(known)}",
        )


def _check_number(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LoweringError(f"{where}: {value!r} is not a number")
    if not math.isfinite(value):
        raise LoweringError(f"{where}: {value} is not finite")
    if value <= 0:
        raise LoweringError(f"{where}: {value} is not above zero")
