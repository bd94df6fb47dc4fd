"""How long the parts of a change of the world take."""

from __future__ import annotations

from elastic_batch.coordinator.metrics import Cause, Step


class Rescale:
    """Stopwatch of one change after the other: detect, agree, form, sync. Times are seconds of the caller's clock."""

    def __init__(self) -> None:
        self._noticed_at: float | None = None
        self._decided_at: float | None = None
        self._forms_at: float | None = None
        self._cause: Cause | None = None
        self._sync_seconds = 0.0

    @property
    def is_forming(self) -> bool:
        """Whether a world forms."""
        return self._forms_at is not None

    @property
    def is_under_way(self) -> bool:
        """Whether workers wait for a world, or for the last one to end."""
        return self._noticed_at is not None

    def noticed(self, at: float) -> None:
        """Something happened that calls for another world."""
        if self._noticed_at is None:
            self._noticed_at = at

    def decided(self, now: float, cause: Cause | None) -> None:
        """The world was ended or asked to regroup.

        Args:
            now: Seconds.
            cause: Why; None: the next world's members will tell.
        """
        self.noticed(now)
        if self._decided_at is None:
            self._decided_at = now
        self._forms_at, self._cause, self._sync_seconds = None, cause or self._cause, 0.0

    def forms(self, now: float, cause: Cause) -> None:
        """A world was announced."""
        self.decided(now, self._cause or cause)
        self._forms_at = now

    def synced(self, seconds: float) -> None:
        """A worker took so long to agree on the state, once the world was formed."""
        self._sync_seconds = max(self._sync_seconds, seconds)

    def trains(self, now: float) -> tuple[Cause, dict[Step, float]]:
        """The change is over: its cause and the seconds of its steps. The next one starts anew."""
        assert self._noticed_at is not None
        assert self._decided_at is not None
        assert self._forms_at is not None
        assert self._cause is not None
        result: dict[Step, float] = {
            "detect": self._decided_at - self._noticed_at,
            "agree": self._forms_at - self._decided_at,
            "form": now - self._forms_at - self._sync_seconds,
            "sync": self._sync_seconds,
        }
        cause = self._cause
        self._noticed_at = self._decided_at = self._forms_at = self._cause = None
        self._sync_seconds = 0.0
        return cause, result
