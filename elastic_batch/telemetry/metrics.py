"""Prometheus metrics of a run, fed with the records that the run directory gets too. It does not import torch.

The names are declared here, those of changing worlds in coordinator/metrics.py; docs/metrics.md explains them.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from elastic_batch.version import VERSION

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)

_PREFIX = "elastic_batch"
CHECKPOINT_RESULTS = ("saved", "failed", "superseded")
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

_UPDATE_GAUGES = {
    # field of the record: (metric, help)
    "position": ("position_samples", "Samples committed"),
    "epoch": ("epoch", "Position in epochs"),
    "phase": ("phase", "Index of the schedule's phase, from 0"),
    "global_batch_size": ("global_batch_samples", "Samples of an update"),
    "num_micro_batches": ("micro_batches", "Micro-batches of an update"),
    "learning_rate": ("learning_rate", "Learning rate"),
    "momentum": ("momentum", "Momentum"),
    "noise_scale": ("noise_scale", "Scheduled noise scale"),
    "measured_noise_scale": ("measured_noise_scale", "Noise scale estimated from gradients; NaN without enough data"),
    "gradient_square": ("gradient_square", "Estimated squared norm of the true gradient; NaN without enough data"),
    "gradient_variance": ("gradient_variance", "Estimated variance of a sample's gradient; NaN without enough data"),
    "loss": ("loss", "Mean training loss of an update"),
    "gradient_norm": ("gradient_norm", "Norm of the gradient before clipping; NaN where not computed"),
    "samples_per_second": ("samples_per_second", "Samples per second of an update, all workers together"),
    "generation": ("generation", "Generation of the world"),
}


class Metrics:
    """The metrics of one run, each with the label `run`. A gauge appears when its value is first known.

    Args:
        registry: Where they are registered; a registry holds one `Metrics`.
        run: The value of the label `run`.
        clock: Seconds since 1970, for the age of the checkpoint.
    """

    def __init__(self, registry: CollectorRegistry, *, run: str, clock: Callable[[], float] = time.time) -> None:
        self._registry, self._run, self._clock = registry, run, clock
        self._position = 0
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        self._gauges = {field: self._gauge(name, text) for field, (name, text) in _UPDATE_GAUGES.items()}
        self._accumulation_steps = self._gauge(
            "accumulation_steps", "Micro-batches of the worker with the largest share"
        )
        self._workers = self._gauge("workers", "Workers in the world, by state", "state")
        self._evaluation = self._gauge("evaluation", "Result of the newest evaluation, by metric", "metric")
        self._lost_samples = self._gauge("lost_samples", "Samples before the position that the ledger does not have")
        self._checkpoint_bytes = self._gauge("checkpoint_bytes", "Size of the newest checkpoint")
        self._checkpoint_position = self._gauge("checkpoint_position_samples", "Position of the newest checkpoint")
        self._checkpoint_age = self._gauge("checkpoint_age_seconds", "Time since the newest checkpoint was written")
        self._update_seconds = self._histogram("update_seconds", "Time of an update")
        self._step_seconds = self._histogram("update_step_seconds", "Time of an update's parts, by step", "step")
        self._checkpoint_seconds = self._histogram(
            "checkpoint_seconds", "Time of writing a checkpoint, in the background"
        )
        self._blocked_seconds = self._histogram("checkpoint_blocked_seconds", "Time that training waited for a copy")
        self._updates = self._counter("updates", "Updates done, repeated ones included")
        self._samples = self._counter("samples", "Samples of the updates done, repeated ones included")
        self._repeated = self._counter("repeated_updates", "Updates done again after a failure or a resume")
        self._skipped = self._counter("skipped_updates", "Updates that consumed their samples but changed nothing")
        self._checkpoints = self._counter("checkpoints", "Checkpoints, by result: saved, failed, superseded", "result")
        for result in CHECKPOINT_RESULTS:
            self._checkpoints.labels(run, result)
        Info(f"{_PREFIX}_build", "Versions", ("run",), registry=registry).labels(run).info(
            {"version": VERSION, "torch": _torch_version(), "python": platform.python_version()}
        )

    def resume(self, position: int) -> None:
        """Start at a position. Counters begin at 0: Prometheus adds up what the processes of a run count.

        From the count of a checkpoint that is older than the crash they would fall, but not to 0, and all that was ever
        counted would be added once more.

        Args:
            position: Samples committed in the state that training goes on from.
        """
        self._position = position
        self.count()
        self._set("position", position)

    def update(self, record: Mapping[str, Any]) -> None:
        """Take in the record of a committed update."""
        self._count(record)
        self.show(record)

    def happened(self, record: Mapping[str, Any]) -> None:
        """Take in the record of something else than an update.

        Args:
            record: Its `kind` is `evaluation` (a line of the metrics log), `checkpoint` (with `result`: `failed`,
                `superseded`, or `saved` with the arguments of `checkpoint_saved`), `checkpoint found` (with those of
                `checkpoint_found`), `checkpoint blocked` (with `seconds`), `repeated` (with `updates`).

        Raises:
            KeyError, TypeError, ValueError: It is none of these, or lacks something.
        """
        given = {name: value for name, value in record.items() if name not in ("kind", "result")}
        match record["kind"]:
            case "evaluation":
                self.evaluation(record)
            case "checkpoint" if record["result"] == "saved":
                self.checkpoint_saved(**given)
            case "checkpoint" if record["result"] in ("failed", "superseded"):
                self.checkpoints(record["result"], 1)
            case "checkpoint found":
                self.checkpoint_found(**given)
            case "checkpoint blocked":
                self._child(self._blocked_seconds).observe(record["seconds"])
            case "repeated":
                self.repeated(record["updates"])
            case kind:
                raise ValueError(f"{kind!r} is no kind of record")

    def count(self, *, updates: float = 0, samples: float = 0, repeated: float = 0, skipped: float = 0) -> None:
        """Raise the counters of work by so much."""
        self._child(self._updates).inc(updates)
        self._child(self._samples).inc(samples)
        self._child(self._repeated).inc(repeated)
        self._child(self._skipped).inc(skipped)

    def show(self, record: Mapping[str, Any]) -> None:
        """Take in the record of a committed update, but for the counters."""
        self._position = record["position"]
        for field in self._gauges.keys() & record.keys():
            self._set(field, record[field])
        self._share(record)
        self._child(self._update_seconds).observe(record["seconds"])
        for step, seconds in record.get("step_seconds", {}).items():
            self._child(self._step_seconds, step).observe(seconds)

    def workers(self, by_state: Mapping[str, int]) -> None:
        """Take in how many workers there are in each state."""
        for state, number in by_state.items():
            self._child(self._workers, state).set(number)

    def generation(self, generation: int) -> None:
        """Take in the newest world's generation."""
        self._set("generation", generation)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Take in the record of an evaluation."""
        for metric, value in record["metrics"].items():
            self._child(self._evaluation, metric).set(_number(value))

    def repeated(self, updates: int = 1) -> None:
        """Count updates that were discarded and are done again."""
        self._child(self._repeated).inc(updates)

    def checkpoint_saved(self, *, seconds: float, num_bytes: int, position: int, created_seconds: float) -> None:
        """Take in a checkpoint that was written.

        Args:
            seconds: How long the writing took.
            num_bytes: Its size.
            position: Samples committed in it.
            created_seconds: When, in seconds since 1970.
        """
        self.checkpoints("saved", 1)
        self._child(self._checkpoint_seconds).observe(seconds)
        self.checkpoint_found(num_bytes=num_bytes, position=position, created_seconds=created_seconds)

    def checkpoints(self, result: str, number: float) -> None:
        """Count checkpoints by what became of them."""
        self._child(self._checkpoints, result).inc(number)

    def checkpoint_found(self, *, num_bytes: int, position: int, created_seconds: float) -> None:
        """Take in the checkpoint that was resumed from: its size, position and age count until there is a newer one."""
        self._child(self._checkpoint_bytes).set(num_bytes)
        self._child(self._checkpoint_position).set(position)
        self._child(self._checkpoint_age).set_function(lambda: max(0.0, self._clock() - created_seconds))

    def watch_ledger(self, lost_samples: Callable[[int], float]) -> None:
        """Compare the position with an independent reading of the ledger whenever the metrics are read.

        Args:
            lost_samples: Position -> samples before it that the ledger does not have; called on the reading thread.
        """
        self._child(self._lost_samples).set_function(lambda: lost_samples(self._position))

    def _count(self, record: Mapping[str, Any]) -> None:
        samples = record["position"] - self._position
        is_repeated = samples <= 0
        if is_repeated:
            # Back to an earlier position within this process: these samples were counted when they were new.
            samples = record["global_batch_size"]
        self.count(updates=1, samples=samples, repeated=is_repeated, skipped=bool(record.get("skipped")))

    def _share(self, record: Mapping[str, Any]) -> None:
        num_micro_batches, world_size = record["num_micro_batches"], record["world_size"]
        active = min(num_micro_batches, world_size)
        self._child(self._accumulation_steps).set(math.ceil(num_micro_batches / active))
        self._child(self._workers, "active").set(active)
        self._child(self._workers, "spare").set(world_size - active)

    def _set(self, field: str, value: float | None) -> None:
        self._child(self._gauges[field]).set(_number(value))

    def _child(self, metric: _Metric, *labels: str) -> _Metric:
        """The metric with this run's and the given labels. Looked up once: an update sets some twenty of them."""
        key = (metric, labels)
        if key not in self._children:
            self._children[key] = metric.labels(self._run, *labels)
        child: _Metric = self._children[key]
        return child

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", text, ("run", *labels), registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, ("run", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, ("run", *labels), registry=self._registry, buckets=_SECONDS)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _torch_version() -> str:
    """Torch's version without loading it: a coordinator may not even have it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"
