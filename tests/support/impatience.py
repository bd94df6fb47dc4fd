"""A worker that does not wait as long as others for a coordinator that is away."""

from __future__ import annotations

from elastic_batch.worker import session


def grow_impatient() -> None:
    """Say after 0.3 s that it still waits, and give up after 3 s."""
    session._FIRST_PATIENCE_SECONDS = session._PATIENCE_SECONDS = 0.3
    session._AWAY_SECONDS = 3.0
