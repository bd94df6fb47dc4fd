"""What the trainer needs of whatever carries collectives, and of whatever decides who takes part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from elastic_batch.errors import WorldBroken


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Return when the result is in the tensor (on CUDA: when it is ordered before later work of this stream).

        Raises:
            WorldBroken: The collective failed or the world was aborted.
        """


class Engine(Protocol):
    """The collectives of one world, as seen by one of its workers.

    Every worker launches the same collectives in the same order. Calls come from the training thread; `abort` alone
    may come from any thread.
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

    def close(self) -> None:
        """Give back what the engine holds on this worker, without waiting for the others."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a worker would like to happen at the next boundary between updates."""

    leave: bool = False
    """This worker wants to leave the world."""
    regroup: bool = False
    """A new world waits to be formed."""


class Membership(Protocol):
    """Where worlds come from: a fixed one now, a coordinator's session for elastic jobs."""

    def first(self) -> Engine:
        """Block until this worker is in a world."""

    def next(self, ended: Engine) -> Engine:
        """Block until this worker is in the world after `ended`, which broke or was left at a boundary.

        Raises:
            WorldBroken: There is no next world.
        """

    def wishes(self) -> Wishes:
        """What to ask of the others in the update under way. Called once an update; must not block."""


class FixedWorld:
    """The membership of a job whose workers are given once: when one is lost, the job ends."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def first(self) -> Engine:
        return self._engine

    def next(self, ended: Engine) -> Engine:
        raise WorldBroken(
            "a worker was lost, and this world cannot be formed anew; start the job again to resume it",
            ended.generation,
        )

    def wishes(self) -> Wishes:
        return Wishes()
