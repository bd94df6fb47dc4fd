"""What the lead worker leaves behind: records of updates and evaluations, checkpoints, the summary."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from elastic_batch.checkpoint import Manifest
from elastic_batch.engines import Engine
from elastic_batch.errors import CheckpointNotSaved
from elastic_batch.failpoints import reach
from elastic_batch.noise import NoiseScaleEstimator
from elastic_batch.rundir import Commit
from elastic_batch.schedule import Schedule, plan
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.outlets import Outlets, Report
from elastic_batch.trainer.run_checkpoints import RunCheckpoints
from elastic_batch.trainer.saving import Saver
from elastic_batch.trainer.update import Update

logger = logging.getLogger(__name__)

_FIRST_WARNING = 10
"""More updates in a row than a loss scale that is much too high has skipped."""

Collect = Callable[[], dict[str, Any]]


class LeadRecords:
    """Writes down what happens to a run, while this worker leads it.

    Args:
        options: Where to, how often.
        schedule: The run's.
        checkpoints: Where they go.
        generation: That of the world which begins.
        position: Where the run goes on; 0: it begins.
        resumed_from: The checkpoint that was loaded.
        known_checkpoint: Name of the newest one known to be good.
        goes_on: Whether the run that is in the run directory goes on, whatever the options say of resuming.
        report: Hears of everything that metrics count besides updates, on any thread.

    Raises:
        RunDirectoryUsed: A fresh run was asked for in a used directory.
        InvalidSetting: The metrics' port or file cannot be used, or the place or interval of checkpoints.
        OSError: The run directory cannot be written to.
    """

    def __init__(
        self,
        options: TrainerOptions,
        schedule: Schedule,
        checkpoints: RunCheckpoints,
        *,
        generation: int,
        position: int,
        resumed_from: Manifest | None,
        known_checkpoint: str | None,
        goes_on: bool,
        report: Report,
    ) -> None:
        self._options = options
        self._schedule = schedule
        self._checkpoints = checkpoints
        self._known_checkpoint = known_checkpoint
        self._started_at = 0.0
        self._num_skipped, self._warn_at = 0, _FIRST_WARNING
        self._ending: dict[str, Any] = {}
        store, interval = checkpoints.open(generation), checkpoints.interval
        self._outlets = Outlets(options, goes_on=goes_on, report=report)
        self._saver = None if store is None else Saver(store, interval, self._outlets.checkpoint_events)
        if position:
            self._outlets.metrics.resume(position)
        if resumed_from is not None:
            self._outlets.checkpoint_found(resumed_from)

    @property
    def run_id(self) -> str | None:
        """The name of the run in the run directory; None without a directory."""
        return self._outlets.run_id

    @property
    def last_checkpoint(self) -> str | None:
        """Name of the newest checkpoint known to be good."""
        newest = self._saver.newest if self._saver is not None else None
        return self._known_checkpoint if newest is None else newest.name

    def enter(self, generation: int) -> None:
        """A newer world begins under this lead."""
        if self._saver is not None:
            self._saver.enter(generation)

    def complete_ledger(self, commits: Iterable[Commit]) -> None:
        """Write down what an earlier lead worker that was killed may not have."""
        self._outlets.complete_ledger(commits)

    def flush(self) -> None:
        """Let what was recorded survive the end of this process."""
        self._outlets.flush()

    def begin_update(self) -> None:
        """An update starts; what lies between updates is the user's time and does not count."""
        self._started_at = time.monotonic()

    def update(
        self, update: Update, commit: Commit, engine: Engine, estimator: NoiseScaleEstimator | None
    ) -> dict[str, Any]:
        """Record a committed update. Returns the record."""
        seconds = time.monotonic() - self._started_at
        done, values = update.plan, update.plan.values
        record = {
            "kind": "update",
            "update": done.index + 1,
            "position": done.stop,
            "epoch": done.stop / done.num_samples,
            "phase": values.phase,
            "global_batch_size": update.global_batch_size,
            "num_micro_batches": done.num_micro_batches,
            "learning_rate": values.learning_rate,
            "momentum": values.momentum,
            "noise_scale": self._schedule.noise_scale(values),
            "measured_noise_scale": estimator.noise_scale if estimator else None,
            "gradient_square": estimator.gradient_square if estimator else None,
            "gradient_variance": estimator.gradient_variance if estimator else None,
            "loss": update.loss,
            "weight": update.committed_header.weight,
            "gradient_norm": update.gradient_norm,
            "skipped": update.was_skipped,
            "seconds": seconds,
            "step_seconds": update.step_seconds,
            "samples_per_second": update.global_batch_size / seconds if seconds > 0 else math.nan,
            "world_size": engine.size,
            "generation": engine.generation,
            "time": time.time(),
        }
        self._outlets.update(record, commit)
        self._warn_of_skips(update)
        return record

    def _warn_of_skips(self, update: Update) -> None:
        """Say so when nothing is learned any more: after so many skipped updates in a row, and each ten times that."""
        if not update.was_skipped:
            self._num_skipped, self._warn_at = 0, _FIRST_WARNING
            return
        self._num_skipped += 1
        if self._num_skipped == self._warn_at:
            self._warn_at *= 10
            logger.warning(
                "the last %d updates were skipped, up to update %d: losses or gradients are not finite, or nothing in "
                "the batches counts",
                self._num_skipped,
                update.index,
            )

    def evaluation(self, metrics: Mapping[str, float], position: int, num_updates: int) -> None:
        """Record what an evaluation found; the summary has the last one's."""
        self._outlets.evaluation(
            {
                "kind": "evaluation",
                "update": num_updates,
                "position": position,
                "epoch": position / self._schedule.num_samples,
                "metrics": dict(metrics),
                "time": time.time(),
            }
        )
        if self._ending:
            self._summarize()

    def repeated(self) -> None:
        """Count an update that has to be done again."""
        self._outlets.happened({"kind": "repeated", "updates": 1})

    def maybe_checkpoint(self, collect: Collect, before: int, position: int, num_updates: int) -> None:
        """Save a checkpoint if one became due between the positions `before` and `position`."""
        if self._saver is not None and self._saver.is_due(before, position):
            self._checkpoint(self._saver, collect, position, num_updates)

    def secure(self, collect: Collect, position: int, num_updates: int) -> None:
        """Save the state, and wait for that; whether it is saved is asked once more in `finish`."""
        if self._saver is not None and position:
            self._save_last(self._saver, collect, position, num_updates)

    def finish(self, collect: Collect | None, position: int, num_updates: int, reason: str | None) -> None:
        """The loop over the updates ended: save the last state and the summary.

        Args:
            collect: Gives the state; None if there is none that belongs to the position.
            position: Samples committed.
            num_updates: Updates committed.
            reason: Why it ended before the schedule did; None if it did not.

        Raises:
            CheckpointNotSaved: The last state is not on the disk.
        """
        saver = self._saver
        if saver is not None and saver.generation < self._checkpoints.newest_writer():
            return  # others went on with the run without this worker, and have begun to write: the end is theirs
        unsaved: CheckpointNotSaved | None = None
        if saver is not None:
            if position and collect is not None:
                unsaved = self._save_last(saver, collect, position, num_updates)
            saver.wait()
        finished = position >= self._schedule.end and unsaved is None
        if unsaved is not None:
            reason = "the state was not saved"
        self._ending = {
            "updates": num_updates,
            "samples": position,
            "finished": finished,
            "reason": "the schedule's end" if finished else reason or "an error",
        }
        self._summarize()
        self._outlets.sync()
        if unsaved is not None:
            raise unsaved

    def close(self) -> None:
        """Write what waits and close everything."""
        with ExitStack() as ending:
            ending.callback(self._outlets.close)
            if self._saver is not None:
                ending.callback(self._saver.close)

    def _save_last(self, saver: Saver, collect: Collect, position: int, num_updates: int) -> CheckpointNotSaved | None:
        """Save the state that a run ends with, at the second attempt if need be. Returns why it is not saved."""
        for _ in range(2):
            self._checkpoint(saver, collect, position, num_updates)
            saver.wait()
            if saver.error is None:
                return None
        return CheckpointNotSaved(num_updates, str(self._checkpoints.location), saver.error, self.last_checkpoint)

    def _checkpoint(self, saver: Saver, collect: Collect, position: int, num_updates: int) -> None:
        reach("checkpoint.start")
        started = time.monotonic()
        if saver.save(collect, self._checkpoints.describe(position, num_updates)):
            self._outlets.happened({"kind": "checkpoint blocked", "seconds": time.monotonic() - started})

    def _summarize(self) -> None:
        planned = plan(self._schedule)
        self._outlets.summarize(
            {
                "name": self._options.name,
                "strategy": self._schedule.rule.partition(",")[0],
                "seed": self._options.seed,
                **self._ending,
                "planned_updates": planned.updates,
                "baseline_updates": planned.baseline_updates,
                "epochs": self._ending["samples"] / self._schedule.num_samples,
            }
        )
