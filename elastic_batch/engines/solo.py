"""The engine of a world with one worker: every sum is already complete."""

from __future__ import annotations

from torch import Tensor

from elastic_batch.engines.protocol import Handle
from elastic_batch.errors import WorldBroken


class SoloEngine:
    """One worker without peers."""

    rank = 0
    size = 1

    def __init__(self, generation: int = 0) -> None:
        self.generation = generation
        self._aborted = False

    def all_reduce(self, tensor: Tensor) -> Handle:
        return _Done(self)

    def broadcast(self, tensor: Tensor, source: int) -> Handle:
        return _Done(self)

    def abort(self) -> None:
        self._aborted = True

    def probe(self) -> None:
        pass

    def close(self) -> None:
        pass

    def check(self) -> None:
        if self._aborted:
            raise WorldBroken("aborted", self.generation)


class _Done:
    """The handle of a collective that had nothing to do."""

    def __init__(self, engine: SoloEngine) -> None:
        self._engine = engine

    def wait(self) -> None:
        self._engine.check()
