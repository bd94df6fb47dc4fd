"""Where the lead worker's records go: run directory, Prometheus metrics, experiment trackers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from elastic_batch.checkpoint import CheckpointInfo, Manifest, WriterEvents
from elastic_batch.errors import InvalidSetting
from elastic_batch.rundir import Commit, RunDirectory, is_used, read_evaluations, read_metrics
from elastic_batch.telemetry import GuardedLogger, Metrics, MetricsFile, MetricsServer
from elastic_batch.trainer.options import TrainerOptions

logger = logging.getLogger(__name__)

_PORT_SECONDS = 30.0
"""Between two attempts to have the metrics' port."""

Report = Callable[[Mapping[str, Any]], None]


class Outlets:
    """Fans records out to everything that the options name; open until `close`.

    Args:
        options: Which outlets there are.
        goes_on: Whether the run that is in the run directory goes on, whatever the options say of resuming.
        report: Hears of everything that metrics count besides updates, on any thread.

    Raises:
        RunDirectoryUsed: A fresh run was asked for in a used directory.
        InvalidSetting: The metrics' port or file cannot be used.
        OSError: The run directory cannot be written to.
    """

    def __init__(self, options: TrainerOptions, *, goes_on: bool, report: Report) -> None:
        self._loggers = [GuardedLogger(type(each).__name__, each) for each in options.loggers]
        self._report = report
        self._directory = _open_directory(options, goes_on)
        self._serve_at = 0.0
        registry = CollectorRegistry()
        self.metrics = Metrics(registry, run=options.name)
        if self._directory is not None:
            self.metrics.watch_ledger(self._directory.lost_samples)
        port, file = options.metrics_port, options.metrics_file
        self._file = None if file is None else MetricsFile(registry, file)
        self._server: MetricsServer | None = None
        self._open_server = None if port is None else partial(MetricsServer, registry, port)
        self._serve(or_later=goes_on)

    @property
    def run_id(self) -> str | None:
        """The name of the run in the run directory."""
        return self._directory.run_id if self._directory is not None else None

    @property
    def checkpoint_events(self) -> WriterEvents:
        """What the writer of checkpoints tells the outlets."""

        def on_saved(manifest: Manifest, seconds: float) -> None:
            self.happened({"kind": "checkpoint", "result": "saved", "seconds": seconds, **_describe(manifest)})

        def on_failed(_: Exception, __: CheckpointInfo) -> None:
            self.happened({"kind": "checkpoint", "result": "failed"})

        def on_superseded(_: CheckpointInfo) -> None:
            self.happened({"kind": "checkpoint", "result": "superseded"})

        return WriterEvents(before_save=self.sync, saved=on_saved, failed=on_failed, superseded=on_superseded)

    def complete_ledger(self, commits: Iterable[Commit]) -> None:
        """Write down what an earlier lead worker that was killed may not have."""
        if self._directory is not None:
            self._directory.complete(commits)

    def checkpoint_found(self, manifest: Manifest) -> None:
        """Put out which checkpoint the run goes on from."""
        self.happened({"kind": "checkpoint found", **_describe(manifest)})

    def happened(self, record: Mapping[str, Any]) -> None:
        """Put out what metrics count besides updates: see `Metrics.happened`."""
        self.metrics.happened(record)
        self._report(record)

    def update(self, record: Mapping[str, Any], commit: Commit) -> None:
        """Put out the record of a committed update."""
        if self._open_server is not None or self._file is not None:
            self.metrics.update(record)
            self._serve(or_later=True)
        if self._directory is not None:
            self._directory.record(record)
            self._directory.commit(commit)
        if self._file is not None:
            self._file.maybe_write()
        for each in self._loggers:
            each.log(record)

    def _serve(self, *, or_later: bool) -> None:
        """Serve the metrics. An earlier lead worker on this machine may have the port still: it is on its way out."""
        if self._server is not None or self._open_server is None or time.monotonic() < self._serve_at:
            return
        try:
            self._server = self._open_server()
            logger.info("metrics are served at %s", self._server.url)
        except InvalidSetting as error:
            if not or_later:
                raise
            self._serve_at = time.monotonic() + _PORT_SECONDS
            logger.warning("metrics are not served yet: %s", error)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Put out the record of an evaluation."""
        self.happened(record)
        if self._directory is not None:
            self._directory.record(record)
            self._directory.flush()
        for each in self._loggers:
            each.log(record)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Leave a summary in the run directory, with what its log says of the whole run, whoever led it.

        That is the time of all updates, the size of the last one's world, and the metrics of the last evaluation.

        Args:
            summary: The rest, `updates` among it: what the log has of later ones was taken back.
        """
        if self._directory is None:
            return
        self._directory.flush()
        path, num_updates = self._directory.path, summary["updates"]
        seconds, world_size, metrics = [], None, {}
        for record in read_metrics(path):
            if record["update"] <= num_updates:
                seconds.append(record["seconds"])
                world_size = record["world_size"]
        for record in read_evaluations(path):
            if record["update"] <= num_updates:
                metrics = record["metrics"]
        found = {"world_size": world_size, "seconds": math.fsum(seconds), "metrics": metrics}
        self._directory.summarize({**summary, **found})

    def flush(self) -> None:
        """Let the run directory's logs survive the end of this process."""
        if self._directory is not None:
            self._directory.flush()

    def sync(self) -> None:
        """Bring the run directory's logs to the disk."""
        if self._directory is not None:
            self._directory.sync()

    def close(self) -> None:
        """Write what waits, stop serving, end the trackers."""
        if self._file is not None:
            self._file.write()
        if self._server is not None:
            self._server.close()
        if self._directory is not None:
            self._directory.close()
        for each in self._loggers:
            each.close()


def complete_ledger(options: TrainerOptions, commits: Iterable[Commit]) -> None:
    """As `Outlets.complete_ledger`, for a worker that is not the lead and never will be."""
    if (directory := _open_directory(options, goes_on=True)) is not None:
        directory.complete(commits)
        directory.close()


def _describe(manifest: Manifest) -> dict[str, Any]:
    return {
        "num_bytes": manifest.num_bytes,
        "position": manifest.position,
        "created_seconds": manifest.created_seconds,
    }


def _open_directory(options: TrainerOptions, goes_on: bool) -> RunDirectory | None:
    path = options.run_dir
    if path is None:
        return None
    job = options.job or options.as_plain_values()
    if (goes_on or options.resume != "never") and is_used(Path(path)):
        return RunDirectory.resume(path, job)
    return RunDirectory.create(path, job)
