"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elastic_batch.trainer.handover import NOWHERE, Whereabouts
from elastic_batch.trainer.header import Header


@dataclass(slots=True)
class Progress:
    """What, beside the state that checkpoints hold, describes where a worker stands.

    Attributes:
        position: Samples committed.
        num_updates: Updates committed.
        origin: Generation of the world that made the state; -1: there is none yet.
        width: Micro-batches of a pass; 0: not settled.
        header: The newest update's.
        stop_reason: Why the run stopped before its end; None: it did not.
        stop_wanted: Why this worker wants it to stop after the next update; None: it does not.
    """

    position: int = 0
    num_updates: int = 0
    origin: int = -1
    width: int = 0
    header: Header | None = None
    stop_reason: str | None = None
    stop_wanted: str | None = None

    @property
    def whereabouts(self) -> Whereabouts:
        """What decides whose state the workers of a new world take."""
        return NOWHERE if self.origin < 0 else Whereabouts(self.origin, self.position)

    def to_state(self) -> dict[str, Any]:
        """As plain values, for a worker that takes the state over."""
        return {
            "position": self.position,
            "num_updates": self.num_updates,
            "origin": self.origin,
            "width": self.width,
            "header": None if self.header is None else self.header.summary,
        }

    def take(self, state: dict[str, Any]) -> None:
        """Become what another worker's `to_state` says."""
        header = state["header"]
        self.position, self.num_updates, self.origin = state["position"], state["num_updates"], state["origin"]
        self.width = self.width or state["width"]
        self.header = None if header is None else Header.committed_elsewhere(*header)
