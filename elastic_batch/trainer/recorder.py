"""What every worker keeps for the run's records, so that whoever leads can write them."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any

from elastic_batch.checkpoint import Checkpoint, Manifest
from elastic_batch.engines import Engine
from elastic_batch.errors import RunDirectoryMissing
from elastic_batch.noise import NoiseScaleEstimator
from elastic_batch.rundir import Commit, Hold, read_run_id
from elastic_batch.schedule import Schedule
from elastic_batch.strict_json import to_json
from elastic_batch.trainer.lead import Collect, LeadRecords
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.outlets import Report, complete_ledger
from elastic_batch.trainer.progress import Progress
from elastic_batch.trainer.run_checkpoints import RunCheckpoints
from elastic_batch.trainer.saving import save_unless_saved
from elastic_batch.trainer.update import Update

logger = logging.getLogger(__name__)

_KEPT_COMMITS = 1024
"""What this worker may have to write down for a lead worker that was killed: its lines waited for a second at most."""


class Recorder:
    """One worker's part in the records: all of them while it leads, and what the next lead must know otherwise.

    Args:
        options: Where to, how often.
        schedule: The run's.
        fingerprint: What alters the trajectory.

    Attributes:
        checkpoints: The run's.
        lead: The records; None on other workers than the lead.
        last_record: The newest update's record; empty before the first, and on other workers than the lead.
        report: Hears of everything that metrics count besides updates, on any thread.
    """

    def __init__(self, options: TrainerOptions, schedule: Schedule, fingerprint: Mapping[str, Any]) -> None:
        self._options = options
        self._schedule = schedule
        self.checkpoints = RunCheckpoints(options, schedule, fingerprint)
        self.lead: LeadRecords | None = None
        self._is_alone = False
        self._hold: Hold | None = None
        self._resumed_from: Manifest | None = None
        self._known_checkpoint: str | None = None
        self._commits: deque[Commit] = deque(maxlen=_KEPT_COMMITS)
        self._owes = False
        self.last_record: dict[str, Any] = {}
        self.report: Report = lambda record: None

    @property
    def last_checkpoint(self) -> str | None:
        """Name of the newest checkpoint known to be good; workers other than the lead know an older one."""
        return self._known_checkpoint if self.lead is None else self.lead.last_checkpoint

    @property
    def run_id(self) -> str | None:
        """The name of the run in the run directory; None on other workers than the lead, or without a directory."""
        return self.lead.run_id if self.lead is not None else None

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

    def claim(self) -> None:
        """Have the run for this world alone: there is no coordinator that keeps others out and numbers worlds.

        Raises:
            RunDirectoryBusy: Another process has the run directory.
            OSError: It cannot be written to.
        """
        self._is_alone = True
        if self._hold is None and self._options.run_dir is not None:
            self._hold = Hold(Path(self._options.run_dir))

    def resume(self, checkpoint: Checkpoint, where: str) -> None:
        """Go on from a checkpoint of this job.

        Args:
            checkpoint: The checkpoint.
            where: Its place, for the message.

        Raises:
            JobDiffers: It is another job's; with every difference. Or another job's run is in the run directory.
            InvalidSetting: The job now ends before the checkpoint's position.
        """
        self.checkpoints.require_own(checkpoint.manifest, where)
        self._resumed_from = checkpoint.manifest
        self._known_checkpoint = checkpoint.manifest.name

    def enter(self, generation: int, is_lead: bool, progress: Progress, *, is_new: bool) -> None:
        """A world begins: the lead worker's records open, or go on under the new generation; others' close.

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
            return
        if self.lead is not None:
            self.lead.enter(generation)
        else:
            self.lead = LeadRecords(
                self._options,
                self._schedule,
                self.checkpoints,
                generation=self.checkpoints.newest_writer() + 1 if self._is_alone else generation,
                position=progress.position,
                resumed_from=self._resumed_from,
                known_checkpoint=self._known_checkpoint,
                goes_on=not is_new or self._resumed_from is not None,
                report=self.report,
            )
            self._owes = True
        if self._owes:
            self._owes = False
            self.lead.complete_ledger(each for each in self._commits if each.stop <= progress.position)
        # What came before this world then survives this process: its newcomers could not make it good.
        self.lead.flush()

    def update(self, update: Update, engine: Engine, estimator: NoiseScaleEstimator | None) -> None:
        """Note a committed update."""
        done = update.plan
        commit = Commit(done.index + 1, done.start, done.stop, engine.generation)
        self._commits.append(commit)
        if self.lead is not None:
            self.last_record = self.lead.update(update, commit, engine, estimator)

    def secure(self, collect: Collect, progress: Progress) -> str | None:
        """Save the state before an error ends the run, if this worker leads.

        Args:
            collect: Gives the state.
            progress: How far it is.

        Returns:
            Name of the newest checkpoint known to be good; workers other than the lead know an older one.
        """
        if self.lead is not None:
            self.lead.secure(collect, progress.position, progress.num_updates)
        return self.last_checkpoint

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
        if self.lead is not None:
            return
        # The state may have come from a world after that one, which broke as it formed.
        store = self.checkpoints.open(max(ended.generation, progress.origin))
        if store is None:
            return
        try:
            info = self.checkpoints.describe(progress.position, progress.num_updates)
            if (manifest := save_unless_saved(store, collect, info, turn=ended.rank)) is not None:
                logger.info("saved checkpoint %s: this worker may be the last one", manifest.name)
            if broken:
                complete_ledger(self._options, self._commits)
        except Exception as error:
            logger.error("the state of update %d could not be saved: %s", progress.num_updates, error)

    def close(self) -> None:
        """Write what waits and close everything."""
        self._known_checkpoint = self.last_checkpoint
        with ExitStack() as ending:
            if self._hold is not None:
                ending.callback(self._hold.close)
            if self.lead is not None:
                ending.callback(self.lead.close)
            self.lead = self._hold = None
