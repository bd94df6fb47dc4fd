"""What Prometheus reads of an elastic run: the run's own metrics, and those of its changing worlds."""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from elastic_batch.coordinator.decide import desired_workers, worker_state
from elastic_batch.coordinator.state import MembershipConfig, State, WorkerState
from elastic_batch.rundir import LedgerReader
from elastic_batch.telemetry.metrics import CHECKPOINT_RESULTS, Metrics

Cause = Literal["start", "join", "leave", "loss", "shrink", "retry"]
"""Why a world was formed: the first; workers came, were told to go, were lost, were too many; the last one failed."""
Step = Literal["detect", "agree", "form", "sync"]
"""Parts of a rescale: until the decision; until the workers wait for the next world; until they have formed it; until
they have one state."""
_SECONDS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0)
_LEDGER_BYTES = 1 << 20
"""What is read of the ledger for one answer: all of it may be long after a restart, and others wait meanwhile."""
_TOTALS = ("updates", "samples", "repeated", "skipped")
_CHECKPOINT = ("num_bytes", "position", "created_seconds")
"""What is known of the newest checkpoint."""


class WorldMetrics:
    """The metrics of one elastic run.

    Args:
        registry: Where they are registered.
        run: The value of the label `run`.
        ledger: Reads what workers write down in the run directory.

    Attributes:
        totals: The counters' values by name, to be given to `resume` after a restart.
    """

    def __init__(self, registry: CollectorRegistry, *, run: str, ledger: LedgerReader | None = None) -> None:
        self._registry, self._run = registry, run
        self._metrics = Metrics(registry, run=run)
        self._desired = Gauge(
            "elastic_batch_desired_workers", "Workers that the world should have now", ("run",), registry=registry
        )
        self._rescales = Counter(
            "elastic_batch_rescales", "Worlds formed, by cause", ("run", "cause"), registry=registry
        )
        self._rescale_seconds = Histogram(
            "elastic_batch_rescale_seconds",
            "Time of a change of the world, by step",
            ("run", "step"),
            registry=registry,
            buckets=_SECONDS,
        )
        if ledger is not None:
            self._metrics.watch_ledger(lambda _: _holes(ledger))
        self._last: dict[str, Any] = {}
        self.totals: dict[str, float] = {}
        for cause in get_args(Cause):
            self._rescales.labels(run, cause)

    def resume(self, totals: Mapping[str, float], record: Mapping[str, Any]) -> None:
        """Start where an earlier coordinator of the run ended."""
        self._raise_to(totals)
        for cause in get_args(Cause):
            before = totals.get(f"rescales_{cause}", 0.0)
            self._rescales.labels(self._run, cause).inc(before)
            self.totals[f"rescales_{cause}"] = before
        for result in CHECKPOINT_RESULTS:
            before = totals.get(f"checkpoints_{result}", 0.0)
            self._metrics.checkpoints(result, before)
            self.totals[f"checkpoints_{result}"] = before
        found = {name: totals[key] for name in _CHECKPOINT if (key := f"checkpoint_{name}") in totals}
        if len(found) == len(_CHECKPOINT):
            self._metrics.checkpoint_found(
                num_bytes=int(found["num_bytes"]),
                position=int(found["position"]),
                created_seconds=found["created_seconds"],
            )
            self.totals |= {f"checkpoint_{name}": value for name, value in found.items()}
        if record:
            self._show(record)

    def take(self, record: Mapping[str, Any], skipped: int) -> None:
        """Take in the newest update; not every one is reported.

        Args:
            record: Its line in the metrics log.
            skipped: How many were skipped since the last report.
        """
        before, last = dict(self.totals), self._last
        updates = record["update"] - last.get("update", 0)
        samples = record["position"] - last.get("position", 0)
        if updates <= 0:  # an earlier state was taken up: what came after it is done again
            self._raise_to({"repeated": before.get("repeated", 0) + 1 - updates})
            updates, samples = 1, record["global_batch_size"]
        told = {
            "updates": before.get("updates", 0) + updates,
            "samples": before.get("samples", 0) + samples,
            "skipped": before.get("skipped", 0) + skipped,
        }
        self._raise_to(told)
        self._show(record)

    def happened(self, record: Mapping[str, Any]) -> None:
        """Take in what else the lead worker reports.

        Raises:
            KeyError, TypeError, ValueError: The record is not as it should be.
        """
        if record["kind"] == "repeated":
            self._raise_to({"repeated": self.totals.get("repeated", 0) + record["updates"]})
            return
        self._metrics.happened(record)
        if record["kind"] == "checkpoint":
            name = f"checkpoints_{record['result']}"
            self.totals[name] = self.totals.get(name, 0.0) + 1
        if "created_seconds" in record:
            self.totals |= {f"checkpoint_{name}": float(record[name]) for name in _CHECKPOINT}

    def rescaled(self, cause: Cause, seconds: Mapping[Step, float]) -> None:
        """A world began to train.

        Args:
            cause: Why it was formed.
            seconds: How long the parts of the change took.
        """
        self._rescales.labels(self._run, cause).inc()
        self.totals[f"rescales_{cause}"] = self.totals.get(f"rescales_{cause}", 0.0) + 1
        for step, value in seconds.items():
            self._rescale_seconds.labels(self._run, step).observe(max(0.0, value))

    def read(self, now: float, state: State, config: MembershipConfig) -> bytes:
        """Everything, in Prometheus's text format."""
        tally = Tally(worker_state(now, state, worker) for worker in state.workers.values())
        self._metrics.workers({each: tally.get(each, 0) for each in get_args(WorkerState)})
        self._metrics.generation(state.generation)
        self._desired.labels(self._run).set(desired_workers(state, config))
        return generate_latest(self._registry)

    def _show(self, record: Mapping[str, Any]) -> None:
        self._last = dict(record)
        self._metrics.show(record)

    def _raise_to(self, totals: Mapping[str, float]) -> None:
        grown = {name: max(0.0, totals.get(name, 0.0) - self.totals.get(name, 0.0)) for name in _TOTALS}
        self._metrics.count(**grown)
        for name, amount in grown.items():
            self.totals[name] = self.totals.get(name, 0.0) + amount


def _holes(reader: LedgerReader) -> float:
    try:
        ledger = reader.read(_LEDGER_BYTES)
    except OSError:
        return math.nan
    return ledger.holes if ledger.updates else math.nan  # nothing there: the directory may be another machine's
