"""Ghost batch norm: statistics over a fixed number of samples, whatever the batch (Hoffer et al., 2017)."""

from __future__ import annotations

from elastic_batch.ghost.conversion import convert_batch_norm
from elastic_batch.ghost.modules import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, GhostNorm
from elastic_batch.ghost.running import RunningStatistics
from elastic_batch.ghost.statistics import is_recomputing

__all__ = [
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GhostNorm",
    "RunningStatistics",
    "convert_batch_norm",
    "is_recomputing",
]
