"""What is told to the outside while training: Prometheus metrics and experiment trackers."""

from elastic_batch.telemetry.exposition import MetricsFile, MetricsServer, serve
from elastic_batch.telemetry.loggers import GuardedLogger, LateLogger, Logger, open_loggers
from elastic_batch.telemetry.metrics import Metrics

__all__ = [
    "GuardedLogger",
    "LateLogger",
    "Logger",
    "Metrics",
    "MetricsFile",
    "MetricsServer",
    "open_loggers",
    "serve",
]
