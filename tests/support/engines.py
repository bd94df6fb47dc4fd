"""An engine that fails where a test wants it to, and the membership that offers a next world after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from elastic_batch.engines import Engine, Handle, Standing, Wishes
from elastic_batch.errors import WorldBroken


class FailingEngine:
    """Another engine, whose collective number `fail_at` (from 0) breaks the world.

    Args:
        inner: Carries the collectives.
        fail_at: None: never.
        at: Whether the failure shows when the collective is launched, when it is waited for, or `late`: it was carried
            out, and the others know nothing of a failure.
        generation: Which world this is.
    """

    def __init__(self, inner: Engine, fail_at: int | None, at: str = "wait", generation: int = 0) -> None:
        self.inner = inner
        self.fail_at = fail_at
        self.at = at
        self.generation = generation
        self.rank, self.size = inner.rank, inner.size
        self.num_collectives = 0
        self._aborted = False

    def all_reduce(self, tensor: Tensor) -> Handle:
        return self._launch(tensor, None)

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        return self._launch(tensor, source)

    def abort(self) -> None:
        self._aborted = True  # but not the inner one: the next world is on the same connections

    def probe(self) -> None:
        pass

    def check(self) -> None:
        if self._aborted:
            raise WorldBroken("aborted", self.generation)

    def close(self) -> None:
        pass

    def _launch(self, tensor: Tensor, source: int | None) -> Handle:
        number, self.num_collectives = self.num_collectives, self.num_collectives + 1
        fails = number == self.fail_at
        if fails and self.at == "launch":
            raise WorldBroken("a scripted failure", self.generation)
        if fails and self.at == "late":
            return _Failed(self.generation, self._carry(tensor, source))
        if fails:
            if source != self.rank:  # what a broken collective may leave behind
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
            return _Failed(self.generation)
        return self._carry(tensor, source)

    def _carry(self, tensor: Tensor, source: int | None) -> Handle:
        return self.inner.all_reduce(tensor) if source is None else self.inner.broadcast(tensor, source)


class _Failed:
    def __init__(self, generation: int, carried: Handle | None = None) -> None:
        self._generation = generation
        self._carried = carried

    def wait(self) -> None:
        if self._carried is not None:
            self._carried.wait()
        raise WorldBroken("a scripted failure", self._generation)


class RecoveringMembership:
    """Offers a sound world of the next generation after the first one broke.

    Args:
        first: The world that will break.
    """

    is_elastic = False
    goes_on = False

    def __init__(self, first: FailingEngine) -> None:
        self._first = first
        self.num_worlds = 1

    def first(self, standing: Standing, job: Mapping[str, Any]) -> Engine:
        return self._first

    def next(self, ended: Engine, *, broken: bool) -> Engine:
        self.num_worlds += 1
        return FailingEngine(self._first.inner, None, generation=ended.generation + 1)

    def entered(self, engine: Engine) -> None:
        pass

    def wishes(self) -> Wishes:
        return Wishes()

    def leave(self) -> bool:
        return False

    def progress(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass
