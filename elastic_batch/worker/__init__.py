"""A worker's part in an elastic job: its session with the coordinator."""

from elastic_batch.worker.session import Session, join

__all__ = ["Session", "join"]
