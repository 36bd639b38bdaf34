"""Several processes, called ranks, that compile one model together.

Every rank runs the whole compile on the same model and data. What they divide is the work inside of
passes, and always so that each piece is the same tensors for any number of ranks: batches of
calibration data (`share`), and solves (`each`). What they found meets in the order of the batches
(`in_order`), or in sums that no order changes (`add_up`). So the result has the same bits for any
number of ranks, one included. What is not divided rank 0 does alone, and tells (`from_first`).

All talk goes through rank 0, over gloo: what is told lies in the memory of the host, whatever
the processes' own backend is. Each message says first whether its rank has failed, so that an error
of one is raised by all; a rank that has died is seen by the one that waits for it, and named.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from panguq import errors
from panguq.errors import InputError, PanguqError, RankError, first_line

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(hours=12)
"""How long a rank waits for one that lives and says nothing: rank 0 may work alone for long."""
CHUNK = 1 << 20  # numbers of a sum that are sent at once
DONE, FAILED, LOST = "done", "failed", "lost"


class Ranks:
    """The ranks as this one, number `rank` of `count`, sees them. One process is rank 0 of 1."""

    def __init__(self, rank: int = 0, count: int = 1, group: dist.ProcessGroup | None = None):
        self.rank, self.count, self._group = rank, count, group
        self._lost: set[int] = set()
        self._is_over = False  # every rank knows of an error

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of the items, one piece of the sequence; each rank has at least one.

        Raises InputError where there are fewer items than ranks.
        """
        if 0 < len(items) < self.count:
            raise InputError(
                f"{self.count} ranks share {len(items)} batches of calibration data",
                "give more data, or start fewer processes",
            )
        if self.count == 1:
            return items
        return items[self.start(len(items)) : (self.rank + 1) * len(items) // self.count]

    def start(self, items: int) -> int:
        """How many of so many items lie before this rank's share."""
        return self.rank * items // self.count

    def in_order(self, own: Sequence[T]) -> list[T]:
        """What every rank found of its share, in the order of the whole."""
        return [item for some in self.exchange(list(own)) for item in some]

    def each(
        self, items: Sequence[T], cost: Callable[[T], float], work: Callable[[T], R]
    ) -> list[R]:
        """`work` of every item, each done by one rank; the longest go first to who has least."""
        if self.count == 1:
            return [work(item) for item in items]
        owner: dict[int, int] = {}
        load = [0.0] * self.count
        for index in sorted(range(len(items)), key=lambda index: -cost(items[index])):
            owner[index] = load.index(min(load))
            load[owner[index]] += cost(items[index])
        with alone():
            own = {i: work(item) for i, item in enumerate(items) if owner[i] == self.rank}
        found = self.exchange(own)
        return [found[owner[index]][index] for index in range(len(items))]

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which does it alone."""
        if self.count == 1:
            return work()
        with alone():
            own = work() if self.is_first else None
        found: T = self.exchange(own)[0]
        return found

    def largest(self, own: Tensor) -> Tensor:
        """The largest of what every rank has in each place."""
        found = self.exchange(own)
        return found[0] if self.count == 1 else torch.stack(found).amax(0)

    def add_up(self, totals: Sequence[Tensor]) -> None:
        """Add up the contiguous `totals` of all ranks, in place.

        Their order must not matter: whole numbers, or floats whose sums are exact.
        """
        if self.count == 1:
            return
        parts = [part for total in totals for part in total.view(-1).split(CHUNK)]
        self.exchange(None)
        for other in self._partners:
            self._reach(other, partial(self._pass_up, other, parts))
        self.exchange(None)
        for other in self._partners:
            self._reach(other, partial(self._pass_down, other, parts))
        if not self.is_first:
            self._raise_if_lost()

    def exchange(self, own: Any) -> list[Any]:
        """What each rank says, tensors too. Raises what one of them has failed with, on all."""
        if self.count == 1:
            return [own]
        return [what for _, what in self._meet((DONE, own))]

    def tell(self, error: BaseException) -> None:
        """Let the other ranks raise this error as well, unless they know it."""
        if self.count > 1 and not self._is_over:
            with suppress(PanguqError, KeyboardInterrupt):
                self._meet((FAILED, _told(error)))

    @property
    def _partners(self) -> Sequence[int]:
        """Whom this rank talks with."""
        return range(1, self.count) if self.is_first else (0,)

    def _meet(self, own: tuple[str, Any]) -> list[tuple[str, Any]]:
        everyone = [own] if self.is_first else []
        if not self.is_first:
            self._reach(0, partial(self._send, 0, own))
        for other in self._partners:
            everyone.append(self._reach(other, partial(self._receive, other)) or (LOST, None))
        if self.is_first:
            for other in self._partners:
                self._reach(other, partial(self._send, other, everyone))
        else:
            self._raise_if_lost()
            everyone = everyone[0]  # type: ignore[assignment]  # what rank 0 heard
        for wanted in (LOST, FAILED):  # who died is why others failed
            for rank, (state, what) in enumerate(everyone):
                if state == wanted:
                    self._is_over = True
                    raise _lost(rank) if state == LOST else _as_raised(rank, what)
        return everyone

    def _reach(self, other: int, talk: Callable[[], T]) -> T | None:
        """What the talk with a rank yields; None where it has died, which is noted."""
        if other not in self._lost:
            try:
                return talk()
            except RuntimeError:  # gloo's, for a connection that was closed and one too slow
                self._lost.add(other)
        return None

    def _raise_if_lost(self) -> None:
        if self._lost:
            self._is_over = True
            raise _lost(min(self._lost))

    def _pass_up(self, other: int, parts: Sequence[Tensor]) -> None:
        for part in parts:
            if self.is_first:
                received = torch.empty_like(part)
                dist.recv(received, group=self._group, group_src=other)
                part += received
            else:
                dist.send(part, group=self._group, group_dst=other)

    def _pass_down(self, other: int, parts: Sequence[Tensor]) -> None:
        for part in parts:
            if self.is_first:
                dist.send(part, group=self._group, group_dst=other)
            else:
                dist.recv(part, group=self._group, group_src=other)

    def _send(self, to: int, what: object) -> None:
        data = torch.frombuffer(_bytes_of(what), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)]), group=self._group, group_dst=to)
        dist.send(data, group=self._group, group_dst=to)

    def _receive(self, source: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, group=self._group, group_src=source)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, group=self._group, group_src=source)
        return pickle.loads(data.numpy().data)


ONE = Ranks()
_current: ContextVar[Ranks | None] = ContextVar("ranks", default=None)


def ranks() -> Ranks:
    """The ranks that this process is one of: those of `as_ranks`, else itself."""
    return _current.get() or ONE


@contextmanager
def alone() -> Iterator[None]:
    """What runs inside is one rank's own work: it has all that it needs, and asks nobody."""
    token = _current.set(ONE)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def as_ranks() -> Iterator[Ranks]:
    """Work with all processes of `torch.distributed`, if it is initialized and they are several.

    All must come here, and none leaves before all are done. What one raises, all raise: a
    PanguqError as it is, anything else as a RankError. Inside of itself it does nothing.
    """
    if _current.get() is not None or not dist.is_available() or not dist.is_initialized():
        yield ranks()
        return
    if dist.get_world_size() == 1:
        yield ONE
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    joint = Ranks(dist.get_rank(), dist.get_world_size(), group)
    token = _current.set(joint)
    logger = logging.getLogger("panguq")
    if not joint.is_first:
        logger.addFilter(_only_errors)
    try:
        try:
            yield joint
        except BaseException as error:
            joint.tell(error)
            raise
        joint.exchange(None)
    finally:
        logger.removeFilter(_only_errors)
        _current.reset(token)
        with suppress(RuntimeError):
            dist.destroy_process_group(group)


def meet() -> bool:
    """Take part in `torch.distributed` where torchrun started this process as one of several.

    True if this process is one of several. Raises RankError where they do not find each other.
    """
    if dist.is_available() and not dist.is_initialized() and _started_by_torchrun():
        try:
            dist.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"the processes that torchrun started do not find each other: {first_line(error)}",
                "see MASTER_ADDR and MASTER_PORT, or torchrun's --rdzv options",
            ) from error
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _started_by_torchrun() -> bool:
    named = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in named) and os.environ["WORLD_SIZE"] != "1"


def _only_errors(record: logging.LogRecord) -> bool:
    """What the first rank logs as well, another one does not."""
    return record.levelno >= logging.ERROR


def _lost(rank: int) -> RankError:
    return RankError(
        f"rank {rank} has ended, or was not heard of for {PATIENCE.total_seconds() / 3600:.0f} h",
        "its own output says why, unless it was killed (too little memory?); start all again: "
        "with the same work folder the compile goes on",
    )


def _told(error: BaseException) -> tuple[type[BaseException], str, str]:
    """What another rank needs to raise the error."""
    if isinstance(error, PanguqError) and type(error).__module__ == errors.__name__:
        return type(error), error.message, error.hint
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt, "", ""
    return RankError, first_line(error, typed=True), "the output of that process says more"


def _as_raised(rank: int, told: tuple[type[BaseException], str, str]) -> BaseException:
    kind, message, hint = told
    if kind is KeyboardInterrupt:
        return KeyboardInterrupt()
    if kind is RankError and not message.startswith("rank "):
        message = f"rank {rank} has failed: {message}"
    return kind(message, hint)


class _Pickler(pickle.Pickler):
    """Tensors as their bytes: torch's own way keeps a whole storage, and takes longer."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        plain = value.detach().contiguous()
        return _tensor, (plain.view(-1).view(torch.uint8).numpy(), plain.dtype, plain.shape)


def _tensor(data: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(data).view(dtype).view(shape)


def _bytes_of(what: object) -> bytearray:
    into = io.BytesIO()
    _Pickler(into, protocol=5).dump(what)
    return bytearray(into.getbuffer())
