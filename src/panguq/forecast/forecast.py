"""A request's time on a server, from the prompt to the last token, and what it needs of the card.

    time to first token     max(host, device) of the prompt
    time per output token   max(host, device) of a decoding step, the mean over all of them
    request                 first token + (new tokens - 1) x time per output token

The host's part is the server's launch path (`launch_paths.py`), the device's the sum of its kernels
(`device.py`). Whichever takes longer rules: kernels that wait for the host are not faster for being
quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from panguq.errors import InputError
from panguq.forecast.achieved import ACHIEVED, CARD_GIB, CARD_SHARE, Achieved
from panguq.forecast.device import Device
from panguq.forecast.launch_paths import LaunchPath
from panguq.forecast.memory import MIB, Memory, activation_bytes, cache_bytes, card_weight_bytes
from panguq.forecast.parallel import ONE_CARD, Cards, check_cards
from panguq.forecast.sizes import OpenSizes
from panguq.forecast.work import Work, work_of
from panguq.ir.interface import Interface
from panguq.lowering.problem import Dtype, WeightFormat
from panguq.lowering.target import Target


@dataclass(frozen=True)
class Request:
    """`batch` sequences at once, each of a prompt and of new tokens."""

    batch: int = 1
    prompt: int = 1024
    new_tokens: int = 256

    @property
    def context(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt + self.new_tokens


@dataclass(frozen=True)
class ServedStep:
    """Milliseconds of a step, the host's and the device's parts, and which of both it waits for."""

    host: Mapping[str, float]
    device: Mapping[str, float]

    @property
    def host_ms(self) -> float:
        return sum(self.host.values())

    @property
    def device_ms(self) -> float:
        return sum(self.device.values())

    @property
    def ms(self) -> float:
        """The longer of both."""
        return max(self.host_ms, self.device_ms)

    @property
    def bound_by(self) -> Literal["host", "device"]:
        """What the step waits for."""
        return "host" if self.host_ms >= self.device_ms else "device"

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "ms": self.ms,
            "bound_by": self.bound_by,
            "host_ms": self.host_ms,
            "device_ms": self.device_ms,
            "parts": {
                **{f"host_{name}_ms": ms for name, ms in self.host.items()},
                **{f"device_{name}_ms": ms for name, ms in self.device.items()},
            },
        }


@dataclass(frozen=True)
class Times:
    """A request's steps: its prompt, and the mean decoding step."""

    prefill: ServedStep
    decode: ServedStep
    request: Request

    @property
    def request_s(self) -> float:
        """Seconds from the prompt to the last token."""
        return (self.prefill.ms + (self.request.new_tokens - 1) * self.decode.ms) / 1000

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all sequences in a second."""
        return self.request.batch * self.request.new_tokens / self.request_s


@dataclass(frozen=True)
class Forecast:
    """A model under its schemes and in float, on a server. `notes` are sentences that a reader must
    know: what fell back, and what nobody measured."""

    scheme: str
    target: str
    dtype: Dtype
    path: LaunchPath
    request: Request
    cards: Cards
    times: Times
    float_times: Times
    memory: Memory
    float_memory: Memory
    is_float: bool
    notes: tuple[str, ...]

    @property
    def gain(self) -> float:
        """How many times faster than the float model the whole request is."""
        return self.float_times.request_s / self.times.request_s

    @property
    def fits(self) -> bool | None:
        """Whether weights, cache and activations fit the card; None where its memory is unknown."""
        if self.memory.usable is None:
            return None
        needed = self.memory.needed(self.request.batch, self.request.context)
        return needed <= self.memory.usable


def forecast(
    gm: fx.GraphModule,
    interface: Interface,
    target: Target,
    path: LaunchPath,
    request: Request,
    *,
    scheme: str,
    dtype: Dtype = "bfloat16",
    weight_format: WeightFormat = "NZ",
    cards: Cards = ONE_CARD,
    card_bytes: int | None = None,
    achieved: Achieved = ACHIEVED,
    config: Any = None,
) -> Forecast:
    """Predict a request for a canonical graph whose linears have schemes.

    scheme: what to call these. config: the model's, for its longest context, where the graph does
    not have it in `meta`. card_bytes: a card's memory, where it is not the target's own.
    Raises InputError for a model that does not generate, a request that is longer than the model
    reads, and cards that do not divide it; LoweringError for a target that predicts no models and
    for a scheme without a kernel.
    """
    if interface.kind != "causal_lm":
        raise InputError("a forecast is of models that generate, and this one does not")
    config = gm.meta.get("config") if config is None else config
    longest = interface.max_positions or getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and request.context > longest:
        raise InputError(
            f"a prompt of {request.prompt} and {request.new_tokens} new tokens are more than the "
            f"{longest} that the model reads",
            "give --prompt and --new-tokens that fit",
        )
    work = work_of(gm, interface, dtype)
    check_cards(cards, work, interface, config)
    device = Device(target, achieved, cards, weight_format)
    notes = [*dict.fromkeys(device.settled(m).note for m in work.matmuls if device.settled(m).note)]
    schemes = {device.settled(matmul).problem.scheme.name for matmul in work.matmuls}
    notes += _unmeasured(path, work, target, request, cards)
    notes += _untimed(path, schemes)
    times = [_times(gm, interface, work, device, path, request, f) for f in (False, True)]
    usable = _usable(target, card_bytes)
    token, fixed = cache_bytes(interface, cards.tensor)
    held = min(request.batch * request.prompt, path.step_tokens)
    sizes = OpenSizes(gm, interface, {"batch": 1, "seq": held, "past": 0, "kept": request.batch})
    alive = activation_bytes(work, device, sizes)
    memories = [
        Memory(card_weight_bytes(gm, work, device, f), token, fixed, alive, usable)
        for f in (False, True)
    ]
    is_float = all(device.settled(m).problem.scheme.is_float for m in work.matmuls)
    return Forecast(
        scheme=scheme,
        target=target.name,
        dtype=dtype,
        path=path,
        request=request,
        cards=cards,
        times=times[0],
        float_times=times[1],
        memory=memories[0],
        float_memory=memories[1],
        is_float=is_float,
        notes=tuple(notes),
    )


def _times(
    gm: fx.GraphModule,
    interface: Interface,
    work: Work,
    device: Device,
    path: LaunchPath,
    request: Request,
    as_float: bool,
) -> Times:
    batch, prompt, new = request.batch, request.prompt, request.new_tokens

    def step(seq: int, past: int) -> ServedStep:
        sizes = OpenSizes(gm, interface, {"batch": batch, "seq": seq, "past": past, "kept": 1})
        found = device.forward(work, sizes, as_float)
        arguments = (work.layers, work.kernels, found.quantizing_kernels)
        host = path.decode(*arguments, batch) if past else path.prompt(*arguments, batch * seq)
        return ServedStep(_ms(host), _ms(found.parts))

    # A step's device time grows by the same with every token of the past, so the middle is the mean
    # wherever host or device rules throughout; else the mean of both ends and the middle is near.
    ends = [step(1, prompt + at) for at in dict.fromkeys((0, new // 2, max(new - 2, 0)))]
    if len({end.bound_by for end in ends}) == 1:
        ends = [step(1, prompt + (new - 2) // 2)] if new > 2 else ends[:1]
    return Times(step(prompt, 0), _mean(ends), request)


def _mean(steps: list[ServedStep]) -> ServedStep:
    def mean(parts: list[Mapping[str, float]]) -> dict[str, float]:
        return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}

    return ServedStep(mean([s.host for s in steps]), mean([s.device for s in steps]))


def _ms(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: us / 1000 for name, us in parts.items()}


def _usable(target: Target, card_bytes: int | None) -> int | None:
    gib = CARD_GIB.get(target.name)
    whole = card_bytes if card_bytes is not None else None if gib is None else gib * 2**30
    return None if whole is None else int(whole * CARD_SHARE)


def _unmeasured(
    path: LaunchPath, work: Work, target: Target, request: Request, cards: Cards
) -> list[str]:
    """What lies beyond the timings that the launch path was fitted to."""
    notes = []
    if target.name not in path.measured_on.lower().replace(" ", ""):
        notes.append(
            f"the launch path was measured on {path.measured_on}; with {target.name} the host may "
            "be another"
        )
    if work.kernels > path.layer_kernels:
        notes.append(
            f"the launch path was measured on layers of {path.layer_kernels} kernels; a layer here "
            f"has {work.kernels}, and is taken to cost the host as much more: nobody measured it"
        )
    if request.batch > path.batches:
        notes.append(
            f"the launch path was measured up to {path.batches} sequences; {request.batch} are "
            "extrapolated"
        )
    if cards.tensor > 1:
        notes.append("the launch path was measured on one card; more of them were not timed")
    return notes


def _untimed(path: LaunchPath, schemes: set[str]) -> list[str]:
    """What of these schemes' names no server was timed with, in this mode."""
    found = sorted(schemes - {"FLOAT", *path.schemes})
    if not found:
        return []
    return [
        f"{' and '.join(found)} was never timed on a server in {path.mode} mode: its times are the "
        "float model's with other costs of kernels, and a guess at what quantizing inputs costs "
        "the host"
    ]


def memory_mib(found: Forecast, as_float: bool = False) -> dict[str, float | None]:
    """MiB on one card, by what it is for."""
    memory = found.float_memory if as_float else found.memory
    batch, context = found.request.batch, found.request.context
    return {
        "weights": memory.weights / MIB,
        "kv_cache": memory.cache(batch, context) / MIB,
        "activations": memory.activations / MIB,
        "total": memory.needed(batch, context) / MIB,
        "usable": None if memory.usable is None else memory.usable / MIB,
    }
