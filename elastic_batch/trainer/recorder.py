"""What the lead worker leaves behind: records of updates and evaluations, checkpoints, the summary."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any

from elastic_batch.checkpoint import Checkpoint, CheckpointInfo, CheckpointStore, Manifest, check_fingerprint
from elastic_batch.engines import Engine
from elastic_batch.errors import CheckpointNotSaved, RunDirectoryMissing, RunDirectoryUsed
from elastic_batch.failpoints import reach
from elastic_batch.noise import NoiseScaleEstimator
from elastic_batch.rundir import Commit, Hold, read_run_id
from elastic_batch.schedule import Duration, Schedule, plan
from elastic_batch.strict_json import to_json
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.outlets import Outlets, Report, complete_ledger
from elastic_batch.trainer.progress import Progress
from elastic_batch.trainer.saving import Saver, save_unless_saved
from elastic_batch.trainer.update import Update

logger = logging.getLogger(__name__)

Collect = Callable[[], dict[str, Any]]

_KEPT_COMMITS = 1024
"""What this worker may have to write down for a lead worker that was killed: its lines waited for a second at most."""


class Recorder:
    """Makes records and keeps checkpoints. It writes on the lead worker only: see `enter`.

    Args:
        options: Where to, how often.
        schedule: The run's.
        fingerprint: What alters the trajectory.

    Attributes:
        fingerprint: What alters the trajectory.
        last_record: The newest update's record; empty before the first, and on other workers than the lead.
        report: Hears of everything that metrics count besides updates, on any thread.
    """

    def __init__(self, options: TrainerOptions, schedule: Schedule, fingerprint: Mapping[str, Any]) -> None:
        self._options = options
        self._schedule = schedule
        self.fingerprint = fingerprint
        self._is_alone = False
        self._hold: Hold | None = None
        self._outlets: Outlets | None = None
        self._saver: Saver | None = None
        self._resumed_from: Manifest | None = None
        self._known_checkpoint: str | None = None
        self._started_at = 0.0
        self._commits: deque[Commit] = deque(maxlen=_KEPT_COMMITS)
        self._owes = False
        self._final_metrics: dict[str, float] = {}
        self._evaluated_at = -1
        self._ending: dict[str, Any] = {}
        self.last_record: dict[str, Any] = {}
        self.report: Report = lambda record: None

    @property
    def checkpoint_location(self) -> str | None:
        """Where this run's checkpoints lie; None: nowhere."""
        if self._options.checkpoint_location is not None:
            return os.fspath(self._options.checkpoint_location)
        return None if self._options.run_dir is None else os.path.join(self._options.run_dir, "checkpoints")

    @property
    def last_checkpoint(self) -> str | None:
        """Name of the newest checkpoint known to be good; workers other than the lead know an older one."""
        newest = self._saver.newest if self._saver is not None else None
        return newest.name if newest is not None else self._known_checkpoint

    @property
    def run_id(self) -> str | None:
        """The name of the run in the run directory; None on other workers than the lead, or without a directory."""
        return self._outlets.run_id if self._outlets is not None else None

    def require_same_directory(self, run_id: str | None) -> None:
        """See that this worker's run directory is the lead worker's: it may have to write there.

        Args:
            run_id: As the lead worker sees it; None: it does not say.

        Raises:
            RunDirectoryMissing: There is no run in it, or another one: this worker sees another file system.
        """
        path = self._options.run_dir
        if run_id is not None and path is not None and read_run_id(path) != run_id:
            raise RunDirectoryMissing(os.fspath(path))

    def checkpoint_known(self, name: str | None) -> None:
        """Note what another worker said to be the newest good checkpoint."""
        self._known_checkpoint = name

    def commits_after(self, position: int) -> str:
        """This worker's newest commits that end after a position, as text: there may be many."""
        return to_json([astuple(commit) for commit in self._commits if commit.stop > position])

    def committed_elsewhere(self, commits: str) -> None:
        """Note what others committed without this worker: whoever leads may owe it to the ledger."""
        self._commits.extend(Commit(*commit) for commit in json.loads(commits))
        self._owes = True

    def newest_writer(self) -> int:
        """The newest generation that has written checkpoints of this run; -1: none.

        Raises:
            OSError: It cannot be read.
        """
        location = self.checkpoint_location
        return -1 if location is None else CheckpointStore(location).newest_generation()

    def claim(self) -> None:
        """Have the run for this world alone: there is no coordinator that keeps others out and numbers worlds.

        Raises:
            RunDirectoryBusy: Another process has the run directory.
            OSError: It cannot be written to.
        """
        self._is_alone = True
        if self._hold is None and self._options.run_dir is not None:
            self._hold = Hold(Path(self._options.run_dir))

    def require_unused(self) -> None:
        """See that a fresh run would not write over another one's checkpoints.

        Raises:
            RunDirectoryUsed: There are some.
            OSError: It cannot be read.
        """
        location = self.checkpoint_location
        if location is not None and (self.newest_writer() >= 0 or CheckpointStore(location).manifests()):
            raise RunDirectoryUsed(os.fspath(self._options.checkpoint_location or self._options.run_dir or location))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this job.

        Raises:
            JobDiffers: It is another job's; with every difference.
            InvalidSetting: The job now ends before the checkpoint's position.
        """
        manifest = checkpoint.manifest
        where = self.checkpoint_location or f"checkpoint {manifest.name}"
        current = self._fingerprint_at(manifest.position)
        check_fingerprint(manifest.fingerprint, current, where=where, position=manifest.position)
        self._resumed_from = manifest
        self._known_checkpoint = manifest.name

    def enter(self, generation: int, is_lead: bool, progress: Progress, *, is_new: bool) -> None:
        """A world begins: the lead worker's recorder opens, or goes on under the new generation; others close.

        Args:
            generation: The world's.
            is_lead: Whether this worker is its lead.
            progress: How far the run is.
            is_new: Whether no worker of the world had a part in the run before.

        Raises:
            RunDirectoryUsed: A fresh run was asked for in a used directory.
            InvalidSetting: The metrics' port or file cannot be used.
            OSError: The run directory cannot be written to.
        """
        if not is_lead:
            self.close()
        elif self._outlets is None:
            self._open(generation, progress, is_new=is_new)
        elif self._saver is not None:
            self._saver.enter(generation)
        if self._outlets is not None:
            if self._owes:
                self._owes = False
                self._outlets.complete_ledger(each for each in self._commits if each.stop <= progress.position)
            # What came before this world then survives this process: its newcomers could not make it good.
            self._outlets.flush()

    def _open(self, generation: int, progress: Progress, *, is_new: bool) -> None:
        self._outlets = outlets = Outlets(
            self._options, goes_on=not is_new or self._resumed_from is not None, report=self.report
        )
        self._owes = True
        if progress.num_updates:
            outlets.metrics.resume(progress.position)
        if (found := self._resumed_from) is not None:
            outlets.checkpoint_found(found)
        if (location := self.checkpoint_location) is not None:
            if self._is_alone:
                generation = self.newest_writer() + 1
            store = CheckpointStore(location, keep=self._options.keep, generation=generation)
            self._saver = Saver(store, self._checkpoint_interval(), outlets.checkpoint_events)

    def flush(self) -> None:
        """Let what was recorded survive the end of this process."""
        if self._outlets is not None:
            self._outlets.flush()

    def begin_update(self) -> None:
        """An update starts; what lies between updates is the user's time and does not count."""
        self._started_at = time.monotonic()

    def update(self, update: Update, engine: Engine, estimator: NoiseScaleEstimator | None) -> None:
        """Record a committed update."""
        done, values = update.plan, update.plan.values
        commit = Commit(done.index + 1, done.start, done.stop, engine.generation)
        self._commits.append(commit)
        if self._outlets is None:
            return
        seconds = time.monotonic() - self._started_at
        self.last_record = {
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
        self._outlets.update(self.last_record, commit)

    def evaluation(self, metrics: Mapping[str, float], position: int, num_updates: int) -> None:
        """Record what an evaluation found; the summary has the last one's."""
        if self._outlets is None:
            return
        earlier = self._final_metrics if self._evaluated_at == num_updates else {}
        self._final_metrics, self._evaluated_at = {**earlier, **metrics}, num_updates
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
        if self._outlets is not None:
            self._outlets.happened({"kind": "repeated", "updates": 1})

    def maybe_checkpoint(self, collect: Collect, before: int, position: int, num_updates: int) -> None:
        """Save a checkpoint if one became due between the positions `before` and `position`."""
        if self._saver is not None and self._saver.is_due(before, position):
            self._checkpoint(collect, position, num_updates)

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
        if self._outlets is None or self._is_outrun():
            return
        unsaved = self._save_last(collect, position, num_updates) if position and collect is not None else None
        if self._saver is not None:
            self._saver.wait()
        finished = position >= self._schedule.end and unsaved is None
        if unsaved is not None:
            reason = "the state was not saved"
        self._ending = {
            "updates": num_updates,
            "samples": position,
            "finished": finished,
            "reason": "the schedule's end" if finished else reason or "an error",
            "world_size": self.last_record.get("world_size"),
        }
        self._summarize()
        self._outlets.sync()
        if unsaved is not None:
            raise unsaved

    def _is_outrun(self) -> bool:
        """Whether others went on with the run without this worker, and have begun to write: the end is theirs."""
        return self._saver is not None and self._saver.generation < self.newest_writer()

    def _save_last(self, collect: Collect, position: int, num_updates: int) -> CheckpointNotSaved | None:
        """Save the state that a run ends with, at the second attempt if need be. Returns why it is not saved."""
        if (saver := self._saver) is None:
            return None
        for _ in range(2):
            self._checkpoint(collect, position, num_updates)
            saver.wait()
            if saver.error is None:
                return None
        return CheckpointNotSaved(num_updates, str(self.checkpoint_location), saver.error, self.last_checkpoint)

    def save_alone(self, collect: Collect, progress: Progress, ended: Engine, *, broken: bool) -> None:
        """Save the state of a worker that ends because there is no next world for it; the lead does so in `finish`.

        It may be the last one that has the state: the others were lost, or left it to this one. If it is not, no harm
        is done. Whatever goes wrong is logged: the worker ends in any case.

        Args:
            collect: Gives the state.
            progress: How far it is.
            ended: The world that this worker was in last.
            broken: Whether it broke: its lead may have been killed, and then it owes the ledger its last lines.
        """
        if self._outlets is not None or (location := self.checkpoint_location) is None:
            return
        position, num_updates = progress.position, progress.num_updates
        # The state may have come from a world after that one, which broke as it formed.
        generation = max(ended.generation, progress.origin)
        store = CheckpointStore(location, keep=self._options.keep, generation=generation)
        info = CheckpointInfo(position=position, update=num_updates, fingerprint=self._fingerprint_at(position))
        try:
            if (manifest := save_unless_saved(store, collect, info, turn=ended.rank)) is not None:
                logger.info("saved checkpoint %s: this worker may be the last one", manifest.name)
            if broken:
                complete_ledger(self._options, self._commits)
        except Exception as error:
            logger.error("the state of update %d could not be saved: %s", num_updates, error)

    def close(self) -> None:
        """Write what waits and close everything."""
        with ExitStack() as ending:
            if self._hold is not None:
                ending.callback(self._hold.close)
            if self._outlets is not None:
                ending.callback(self._outlets.close)
            if self._saver is not None:
                self._known_checkpoint = self.last_checkpoint
                ending.callback(self._saver.close)
            self._saver = self._outlets = self._hold = None

    def _checkpoint(self, collect: Collect, position: int, num_updates: int) -> None:
        assert self._saver is not None
        assert self._outlets is not None
        reach("checkpoint.start")
        started = time.monotonic()
        info = CheckpointInfo(position=position, update=num_updates, fingerprint=self._fingerprint_at(position))
        if self._saver.save(collect, info):
            self._outlets.happened({"kind": "checkpoint blocked", "seconds": time.monotonic() - started})

    def _fingerprint_at(self, position: int) -> dict[str, Any]:
        """What alters the trajectory before a position: a run may be prolonged, and what comes later with it."""
        position = min(position, self._schedule.end)
        schedule = {**self.fingerprint["schedule"], "so_far": self._schedule.digest(position)}
        return {**self.fingerprint, "schedule": schedule}

    def _checkpoint_interval(self) -> int | None:
        every = self._options.checkpoint_every
        if every is None:
            return None
        return Duration.parse(every, "checkpoint_every").samples(
            num_samples=self._schedule.num_samples,
            tokens_per_sample=self._options.tokens_per_sample,
            total=self._schedule.end,
            field="checkpoint_every",
        )

    def _summarize(self) -> None:
        assert self._outlets is not None
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
                "seconds": self._outlets.seconds_of_updates(),
                "metrics": self._final_metrics,
            }
        )
