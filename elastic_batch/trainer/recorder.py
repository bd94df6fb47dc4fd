"""What the lead worker leaves behind: records, ledger, checkpoints, summary."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elastic_batch.checkpoint import Checkpoint, CheckpointInfo, CheckpointStore, Manifest, WriterEvents, check_fingerprint
from elastic_batch.engines import Engine
from elastic_batch.noise import NoiseScaleEstimator
from elastic_batch.rundir import RunDirectory, is_used
from elastic_batch.schedule import Duration, Schedule, walk
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.saving import Saver
from elastic_batch.trainer.update import Update

logger = logging.getLogger(__name__)

Collect = Callable[[], dict[str, Any]]


class Recorder:
    """Writes what a run leaves behind. On workers other than the lead, and without a run directory, it writes nothing.

    Args:
        options: Where to, how often.
        schedule: The run's.
        fingerprint: What alters the trajectory.

    Attributes:
        last_record: The newest update's record.
        last_checkpoint: Name of the newest checkpoint known to be good.
    """

    def __init__(self, options: TrainerOptions, schedule: Schedule, fingerprint: Mapping[str, Any]) -> None:
        self._options = options
        self._schedule = schedule
        self._fingerprint = fingerprint
        self._directory: RunDirectory | None = None
        self._saver: Saver | None = None
        self._is_lead = False
        self._clock = 0.0
        self._seconds = 0.0
        self._final_metrics: dict[str, float] = {}
        self._ending: dict[str, Any] = {}
        self.last_record: dict[str, Any] = {}
        self.last_checkpoint: str | None = None

    @property
    def checkpoint_location(self) -> str | None:
        """Where this run's checkpoints lie; None: nowhere."""
        if self._options.checkpoint_location is not None:
            return os.fspath(self._options.checkpoint_location)
        return None if self._options.run_dir is None else os.path.join(self._options.run_dir, "checkpoints")

    def check_same_job(self, checkpoint: Checkpoint) -> None:
        """Refuse to resume another job.

        Raises:
            JobDiffers: With every difference.
            InvalidSetting: The job now ends before the checkpoint's position.
        """
        manifest = checkpoint.manifest
        where = self.checkpoint_location or "the checkpoint"
        check_fingerprint(manifest.fingerprint, self._fingerprint, where=where, position=manifest.position)
        self.last_checkpoint = manifest.name

    def open(self, generation: int) -> None:
        """Become the lead worker's recorder.

        Raises:
            RunDirectoryUsed: A fresh run was asked for in a used directory.
            OSError: The run directory cannot be written to.
        """
        self._is_lead = True
        if (path := self._options.run_dir) is not None:
            job = self._options.job or self._options.as_plain_values()
            resumes = self._options.resume != "never" and is_used(Path(path))
            self._directory = RunDirectory.resume(path, job) if resumes else RunDirectory.create(path, job)
        if (location := self.checkpoint_location) is not None:
            store = CheckpointStore(location, keep=self._options.keep, generation=generation)
            events = WriterEvents(before_save=self._sync, saved=self._on_saved)
            self._saver = Saver(store, self._checkpoint_interval(), events)

    def start_clock(self) -> None:
        """An update starts; what lies between updates is the user's time and does not count."""
        self._clock = time.monotonic()

    def update(self, update: Update, engine: Engine, estimator: NoiseScaleEstimator | None) -> None:
        """Record a committed update."""
        if not self._is_lead:
            return
        seconds = time.monotonic() - self._clock
        self._seconds += seconds
        plan, values = update.plan, update.plan.values
        self.last_record = {
            "kind": "update",
            "update": plan.index + 1,
            "position": plan.stop,
            "epoch": plan.stop / plan.num_samples,
            "phase": values.phase,
            "global_batch_size": update.global_batch_size,
            "num_micro_batches": plan.num_micro_batches,
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
            "samples_per_second": update.global_batch_size / seconds if seconds > 0 else math.nan,
            "world_size": engine.size,
            "generation": engine.generation,
            "time": time.time(),
        }
        if self._directory is not None:
            self._directory.record(self.last_record)
            self._directory.commit(
                update=plan.index + 1, start=plan.start, stop=plan.stop, generation=engine.generation
            )

    def evaluation(self, metrics: Mapping[str, float], position: int, num_updates: int) -> None:
        """Record what an evaluation found; the summary has the last one's."""
        if not self._is_lead:
            return
        self._final_metrics = dict(metrics)
        record = {
            "kind": "evaluation",
            "update": num_updates,
            "position": position,
            "epoch": position / self._schedule.num_samples,
            "metrics": self._final_metrics,
            "time": time.time(),
        }
        if self._directory is not None:
            self._directory.record(record)
            self._directory.flush()
        if self._ending:
            self._summarize()

    def repeated(self) -> None:
        """Count an update that has to be done again."""

    def maybe_checkpoint(self, collect: Collect, before: int, position: int, num_updates: int) -> None:
        """Save a checkpoint if one became due between the positions `before` and `position`."""
        if self._saver is not None and self._saver.is_due(before, position):
            self._checkpoint(collect, position, num_updates)

    def finish(self, collect: Collect, position: int, num_updates: int, reason: str | None) -> None:
        """The loop over the updates ended: save the last state and the summary.

        Args:
            collect: Gives the state.
            position: Samples committed.
            num_updates: Updates committed.
            reason: Why it ended before the schedule did; None if it did not.
        """
        if not self._is_lead:
            return
        if position:
            self._checkpoint(collect, position, num_updates)
        if self._saver is not None:
            self._saver.wait()
        finished = position >= self._schedule.end
        self._ending = {
            "updates": num_updates,
            "samples": position,
            "finished": finished,
            "reason": "the schedule's end" if finished else reason or "an error",
            "world_size": self.last_record.get("world_size"),
        }
        self._summarize()
        if self._directory is not None:
            self._directory.sync()

    def close(self) -> None:
        """Write what waits and close the files."""
        if self._saver is not None:
            self._saver.close()
        if self._directory is not None:
            self._directory.close()

    def _checkpoint(self, collect: Collect, position: int, num_updates: int) -> None:
        if self._saver is not None:
            info = CheckpointInfo(position=position, update=num_updates, fingerprint=self._fingerprint)
            self._saver.save(collect(), info)

    def _checkpoint_interval(self) -> int | None:
        every = self._options.checkpoint_every
        if every is None:
            return None
        return Duration.parse(every).samples(
            num_samples=self._schedule.num_samples, tokens_per_sample=self._options.tokens_per_sample
        )

    def _summarize(self) -> None:
        if self._directory is None:
            return
        first_batch = self._schedule.global_batch_size
        self._directory.summarize(
            {
                "name": self._options.name,
                "strategy": self._schedule.rule.partition(",")[0],
                "seed": self._options.seed,
                **self._ending,
                "planned_updates": sum(run.num_updates for run in walk(self._schedule)),
                "baseline_updates": -(-self._schedule.end // first_batch),
                "epochs": self._ending["samples"] / self._schedule.num_samples,
                "seconds": self._seconds,
                "metrics": self._final_metrics,
            }
        )

    def _sync(self) -> None:
        if self._directory is not None:
            self._directory.sync()

    def _on_saved(self, manifest: Manifest, seconds: float) -> None:
        self.last_checkpoint = manifest.name
        logger.info("saved checkpoint %s (%d bytes) in %.2f s", manifest.name, manifest.num_bytes, seconds)
