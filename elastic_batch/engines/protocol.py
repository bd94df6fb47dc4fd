"""What the trainer needs of whatever carries collectives, and of whatever decides who takes part."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from elastic_batch.errors import NoNextWorld

Departure = Literal["left", "finished", "stopped"]
"""How a worker ends. `stopped`: all of them did so after the same update, and the run can be resumed."""
Stage = Literal["wait", "form", "sync", "compute", "reduce", "commit", "user", "evaluate", "end"]
"""What a training thread is at: waiting for a world, forming it, agreeing on a state, running its share, reducing,
committing, in the user's own code, evaluating, saving the last state."""


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Return when the result is in the tensor, on CUDA too: an abort that comes before that must be seen here.

        Raises:
            WorldBroken: The collective failed or the world was aborted.
        """


class Engine(Protocol):
    """The collectives of one world, as seen by one of its workers.

    Every worker launches the same collectives in the same order. Calls come from the training thread; `abort` and
    `probe` may come from any.
    """

    rank: int
    """This worker's place in the world, in [0, size)."""
    size: int
    """Number of workers in the world."""
    generation: int
    """Which world this is; a later one has a higher number."""

    def all_reduce(self, tensor: Tensor) -> Handle:
        """Sum `tensor` over the workers, in place; it must not be touched before the handle was waited for."""

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        """Overwrite `tensor` with that of the worker whose rank is `source`."""

    def abort(self) -> None:
        """Make every pending and later wait here raise `WorldBroken`, within a second. Never blocks."""

    def probe(self) -> None:
        """Abort if a connection to another worker has ended. Never blocks."""

    def check(self) -> None:
        """Raise `WorldBroken` if the world was aborted: nobody should go on to compute for it."""

    def close(self) -> None:
        """Give back what the engine holds on this worker, without waiting for the others."""


LONGEST_STAGE_SECONDS = 600.0
"""How long announced work may take: as long as a collective waits for it."""


@dataclass(slots=True)
class Standing:
    """What a worker is at. The trainer keeps it up to date; whoever reports it reads it from another thread.

    Attributes:
        update: Updates committed.
        position: Samples committed.
        num_micro_batches: Micro-batches of the update that comes next.
        stage: What the training thread is at.
        busy_until: When announced work ends at the latest, in monotonic seconds.
        ended: How this worker's part in the run ended; None: it did not, or with an error.
        newest_writer: The newest generation that has written checkpoints of this run, as this worker found it when it
            came; -1: none. Another coordinator, or a fixed world, may have been at work.
    """

    update: int = 0
    position: int = 0
    num_micro_batches: int = 1
    stage: Stage = "wait"
    busy_until: float = 0.0
    ended: Departure | None = None
    newest_writer: int = -1

    @contextmanager
    def busy(self, seconds: float = LONGEST_STAGE_SECONDS) -> Iterator[None]:
        """Announce work that the others may have to wait for: loading, compiling, evaluating."""
        before = self.busy_until
        self.busy_until = max(before, time.monotonic() + seconds)
        try:
            yield
        finally:
            self.busy_until = before

    @property
    def busy_seconds(self) -> float:
        """How much longer the stage may take without being a stall."""
        return max(0.0, self.busy_until - time.monotonic())


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a worker would like to happen at the next boundary between updates."""

    leave: bool = False
    """This worker wants to leave the world."""
    regroup: bool = False
    """A new world waits to be formed."""
    stop: str | None = None
    """Why the whole run is to stop."""


class Membership(Protocol):
    """Where worlds come from: a fixed one, or a coordinator's session for elastic jobs."""

    is_elastic: bool
    """Whether a world may be joined that trains already: everything slow should then be done before."""
    goes_on: bool
    """Whether the run had made progress when this worker was started: it is not begun once more."""

    def first(self, standing: Standing, job: Mapping[str, Any]) -> Engine:
        """Block until this worker is in a world.

        Args:
            standing: What this worker is at, for as long as it lives.
            job: What alters the trajectory, in plain values; workers of one run have the same.

        Raises:
            LeftWorld: The job was complete, or this worker was told to end, before a world wanted it.
            ElasticBatchError: This worker cannot take part; the message says why.
        """

    def next(self, ended: Engine, *, broken: bool) -> Engine:
        """Block until this worker is in the world after `ended`, which broke or was left at a boundary.

        Raises:
            NoNextWorld: There is none.
            LeftWorld: As in `first`.
        """

    def entered(self, engine: Engine) -> None:
        """The workers of this world have agreed on one state: training goes on in it."""

    def wishes(self) -> Wishes:
        """What to ask of the others in the update under way. Called once an update; must not block."""

    def leave(self) -> bool:
        """This worker is told to end: it would leave at the next boundary. False if the others cannot go on then."""

    def progress(self, record: Mapping[str, Any]) -> None:
        """The lead worker has a new record: an update's line in the metrics log, or what else metrics count.

        Must not block; called on the training thread for updates, on any for other records.
        """

    def close(self) -> None:
        """Say goodbye; the standing tells why."""


_NO_WISHES = Wishes()


class FixedWorld:
    """The membership of a job whose workers are given once: when one is lost, the job ends."""

    is_elastic = False
    goes_on = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def first(self, standing: Standing, job: Mapping[str, Any]) -> Engine:
        return self._engine

    def next(self, ended: Engine, *, broken: bool) -> Engine:
        raise NoNextWorld(
            "a worker was lost, and this world cannot be formed anew; start the job again to resume it",
            ended.generation,
        )

    def entered(self, engine: Engine) -> None:
        pass

    def wishes(self) -> Wishes:
        return _NO_WISHES

    def leave(self) -> bool:
        return False

    def progress(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass
