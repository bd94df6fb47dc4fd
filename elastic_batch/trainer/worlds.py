"""A worker's way from world to world: enter one, take the state that its workers agree on, take up its duties."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from elastic_batch.checkpoint import Checkpoint, check_fingerprint
from elastic_batch.engines import Engine, Membership, Standing
from elastic_batch.errors import NoNextWorld, WorkerFailed, WorldBroken
from elastic_batch.failpoints import reach
from elastic_batch.schedule import Schedule
from elastic_batch.trainer.failures import exchange, judge, texts
from elastic_batch.trainer.handover import NOWHERE, Muster, hand_over, muster
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.plan import plan_update
from elastic_batch.trainer.progress import Progress
from elastic_batch.trainer.recorder import Recorder
from elastic_batch.trainer.saving import SavedState, find_checkpoint

logger = logging.getLogger(__name__)


class Worlds:
    """Brings one worker into world after world. In each, all workers stand at the same position with the same state.

    Args:
        membership: Where worlds come from.
        device: Where the model lives.
        options: Where a run is resumed from.
        schedule: The run's.
        state: What workers hand to each other.
        progress: How far this worker is.
        recorder: This worker's part in the records; opened and closed here, as the lead changes.
        standing: What this worker is at, for whoever reports it.
    """

    def __init__(
        self,
        membership: Membership,
        device: torch.device,
        options: TrainerOptions,
        schedule: Schedule,
        state: SavedState,
        progress: Progress,
        recorder: Recorder,
        standing: Standing,
    ) -> None:
        self._membership = membership
        self._device = device
        self._options = options
        self._schedule = schedule
        self._state = state
        self._progress = progress
        self._recorder = recorder
        self._standing = standing

    def first(self) -> Engine:
        """Enter the first world; its lead takes up the run if nobody has it yet.

        Raises:
            ElasticBatchError: The run directory or the checkpoint cannot be used.
            WorldBroken: The other workers did not come.
        """
        self._look_ahead()
        if self._membership.is_elastic:
            self._standing.newest_writer = self._recorder.checkpoints.newest_writer()
        return self._enter(self._membership.first(self._standing, self._recorder.checkpoints.fingerprint))[0]

    def next(self, ended: Engine, *, broken: bool, evaluating: int = 0) -> tuple[Engine, bool]:
        """Enter the world after one that broke or was left at a boundary.

        Args:
            ended: The world until now.
            broken: Whether it broke.
            evaluating: Which evaluation since the last update this worker is in the middle of, from 1; 0: none.

        Returns:
            The world, and whether all of its workers said that they are at the same one.

        Raises:
            NoNextWorld: There is none.
        """
        return self._enter(self._leave(ended, broken=broken), evaluating)

    def _leave(self, ended: Engine, *, broken: bool) -> Engine:
        if broken:
            ended.abort()  # so that this worker's neighbours hear of it too
        ended.close()
        self._standing.stage = "wait"
        return self._membership.next(ended, broken=broken)

    def _enter(self, engine: Engine, evaluating: int = 0) -> tuple[Engine, bool]:
        while True:
            try:
                return engine, self._agree(engine, evaluating)
            except NoNextWorld:
                raise
            except WorldBroken as error:
                logger.warning("%s", error)
            engine = self._leave(engine, broken=True)

    def _agree(self, engine: Engine, evaluating: int) -> bool:
        """Reach one state on all workers. Returns whether all are at the same evaluation."""
        self._standing.stage = "sync"
        reach("sync.start")
        is_lead = engine.rank == 0
        found = muster(engine, self._progress.whereabouts, evaluating=evaluating, device=self._device)
        is_new = max(found.all) == NOWHERE
        if is_new:
            with self._standing.busy():
                self._attempt(engine, lambda: self._take_up(engine.generation) if is_lead else None)
            found = muster(engine, self._progress.whereabouts, evaluating=evaluating, device=self._device)
        if not found.agreed:
            with self._standing.busy():
                self._take_over(engine, found)
        self._attempt(engine, lambda: self._recorder.enter(engine.generation, is_lead, self._progress, is_new=is_new))
        reach("sync.done")
        self._look_ahead()
        self._membership.entered(engine)
        return found.evaluates_together

    def _look_ahead(self) -> None:
        """Note how many workers the next update can use."""
        progress, schedule = self._progress, self._schedule
        if progress.position < schedule.end:
            plan = plan_update(schedule, progress.num_updates, progress.position)
            self._standing.num_micro_batches = plan.num_micro_batches
        self._standing.update, self._standing.position = progress.num_updates, progress.position

    def _attempt(self, engine: Engine, action: Callable[[], None]) -> None:
        """Do something that may fail on some worker; all raise what one of them meets. A collective."""
        error: Exception | None = None
        try:
            action()
        except Exception as caught:  # of users' own load_state_dict as well: the others must hear of it
            error = caught
        failures = exchange(engine, judge(error, 1) if error else None, self._device)
        if error is not None:
            raise error
        if failures:
            raise WorkerFailed("the start", texts(failures))

    def _take_up(self, generation: int) -> None:
        """Load the checkpoint to resume from, or begin."""
        recorder, resume = self._recorder, os.fspath(self._options.resume)
        checkpoints = recorder.checkpoints
        if not self._membership.is_elastic:
            recorder.claim()
        elif checkpoints.newest_writer() > (-1 if self._membership.goes_on else self._standing.newest_writer):
            resume = "auto"  # all others were lost: what the run once began with is of no use any more
        if resume == "never":
            checkpoints.require_unused()
        checkpoint: Checkpoint | None = find_checkpoint(resume, checkpoints.location)
        progress = self._progress
        if checkpoint is not None:
            recorder.resume(checkpoint, str(checkpoints.location) if resume == "auto" else resume)
            self._state.restore(checkpoint.state)
            progress.position, progress.num_updates = checkpoint.manifest.position, checkpoint.manifest.update
            logger.info(
                "resumed %s at position %d, update %d",
                checkpoint.manifest.name,
                progress.position,
                progress.num_updates,
            )
        progress.origin = generation

    def _take_over(self, engine: Engine, found: Muster) -> None:
        """Have the most advanced worker's state sent to those that have another one or none."""
        wanted = found.all[engine.rank] != found.all[found.source]
        known_to_all = min(place.position for place in found.all)

        def collect() -> dict[str, object]:
            checkpoint = self._recorder.last_checkpoint
            return {
                "common": self._common(),
                "run": self._state.collect(),
                "checkpoint": checkpoint,
                "run_id": self._recorder.run_id,
                "commits": self._recorder.commits_after(known_to_all),
                **self._progress.to_state(),
            }

        received = hand_over(engine, found.source, collect, wanted=wanted, device=self._device)
        if self._membership.is_elastic:  # the others go on without a worker that cannot use it
            self._receive(received, found.source)
        else:
            self._attempt(engine, lambda: self._receive(received, found.source))

    def _common(self) -> dict[str, Any]:
        """What all workers must have been given alike: what they train, and when they meet beside updates."""
        options, known = self._options, self._recorder.checkpoints.fingerprint
        return {
            **known,
            "length": known["end"],
            "check_every": options.check_every,
            "measure_noise": options.measure_noise,
            "evaluation": (options.job or {}).get("evaluation"),
        }

    def _receive(self, received: dict[str, Any] | None, source: int) -> None:
        """Take over what the worker `source` sent, if this one has to."""
        if received is None:
            return
        check_fingerprint(received["common"], self._common(), where=f"the run of worker {source}", position=0)
        self._recorder.require_same_directory(received["run_id"])
        self._progress.origin = -1  # until all of it is in place
        self._state.restore(received["run"])
        self._progress.take(received)
        self._recorder.checkpoint_known(received["checkpoint"])
        self._recorder.committed_elsewhere(received["commits"])
