"""The loop over updates: opens each, settles how it ended, goes from world to world, and ends together."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import NoReturn

from elastic_batch.engines import Departure, Engine, Membership, SoloEngine, Standing, Wishes
from elastic_batch.errors import (
    ElasticBatchError,
    LeftWorld,
    MisusedTrainer,
    WorkerFailed,
    WorkersDiverged,
    WorldBroken,
)
from elastic_batch.failpoints import reach
from elastic_batch.schedule import Schedule
from elastic_batch.trainer.agreement import require_same_parameters
from elastic_batch.trainer.failures import Severity, exchange, judge, texts
from elastic_batch.trainer.header import Header
from elastic_batch.trainer.machinery import Machinery
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.phase_log import PhaseLog
from elastic_batch.trainer.plan import UpdatePlan, forecast, plan_update
from elastic_batch.trainer.progress import Progress
from elastic_batch.trainer.recorder import Recorder
from elastic_batch.trainer.saving import SavedState
from elastic_batch.trainer.signals import stopping_on_signals
from elastic_batch.trainer.update import Outcome, Update
from elastic_batch.trainer.worlds import Worlds

logger = logging.getLogger(__name__)


class UpdateLoop:
    """Runs a worker's part in update after update.

    Args:
        membership: Is asked for wishes, and told of progress.
        worlds: The way into the next world.
        machinery: What updates work with; its engine is replaced with each world.
        schedule: The run's.
        options: The trainer's.
        progress: How far the run is; kept up to date here.
        standing: What this worker is at; kept up to date here.
        state: What checkpoints hold.
        recorder: This worker's part in the records.
        compiles: Whether the first update in this process takes as long as compiling does.

    Attributes:
        machinery: What updates work with.
    """

    def __init__(
        self,
        *,
        membership: Membership,
        worlds: Worlds,
        machinery: Machinery,
        schedule: Schedule,
        options: TrainerOptions,
        progress: Progress,
        standing: Standing,
        state: SavedState,
        recorder: Recorder,
        compiles: bool = False,
    ) -> None:
        self._membership = membership
        self._worlds = worlds
        self.machinery = machinery
        self._schedule = schedule
        self._options = options
        self._progress = progress
        self._standing = standing
        self._state = state
        self._recorder = recorder
        self._wished = Wishes()
        self._everybody_left = False  # the run itself was not stopped: it waits for other workers
        self._compiles = compiles
        self._num_loops = 0
        self._is_left = False
        # Who joins a world that trains already is alone in what its script does before the first update.
        self._is_astray = progress.origin != machinery.engine.generation
        self._num_evaluations = 0
        self._plan: UpdatePlan | None = None
        self._update: Update | None = None
        self._failed_update: int | None = None
        self._phase_log = PhaseLog(schedule.rule, options.spares)

    @property
    def engine(self) -> Engine:
        """The world that this worker is in."""
        return self.machinery.engine

    @property
    def evaluation_engine(self) -> Engine:
        """With whom this worker evaluates: alone where others are elsewhere in their user's code for all it knows."""
        return SoloEngine(self.engine.generation) if self._is_astray else self.engine

    def begin_evaluation(self) -> None:
        """The user evaluates, perhaps not for the first time since the last update."""
        self._num_evaluations += 1

    @property
    def finished(self) -> bool:
        """Whether the schedule's end is reached."""
        return self._progress.position >= self._schedule.end

    def run(self) -> Iterator[Update]:
        """Yield update after update, and settle each after the user's turn, until the run ends or is stopped."""
        progress = self._progress
        self._require_no_update_under_way()
        self.restart_source()
        if self._num_loops:
            progress.stop_reason = None  # that loop's
        self._num_loops = number = self._num_loops + 1
        concluded = False
        with stopping_on_signals(self.on_signal):
            try:
                while not concluded:
                    while not self.finished and progress.stop_reason is None:
                        self._update = update = self._open()
                        with self._standing.busy() if self._compiles else nullcontext():
                            yield update
                        if number != self._num_loops:
                            raise MisusedTrainer("another loop over the updates has begun since; go on with that one")
                        self._compiles &= update.outcome is Outcome.REPEATED  # it may not have come so far
                        self._settle(update)
                    concluded = True  # whatever comes of it, the end is on record
                    concluded = self._conclude()
                if self._everybody_left and not self.finished:
                    self._say_goodbye()
            except GeneratorExit:
                if number == self._num_loops and not (self._update is not None and self._update.has_failed):
                    progress.stop_reason = "the loop over the updates was left"
                raise
            finally:
                if number == self._num_loops:
                    self._is_left = True
                    if not concluded:
                        self._record_end()

    def _require_no_update_under_way(self) -> None:
        """See that a loop over the updates begins where no other is amid one.

        Raises:
            MisusedTrainer: One is, or was left after its reductions with other workers had begun.
        """
        update, is_left = self._update, self._is_left
        if update is not None and update.outcome is Outcome.OPEN:
            if not is_left or update.is_reducing:
                raise MisusedTrainer(
                    f"a loop over the updates begins while update {update.index} of another is under way; end that one "
                    "with update.step() first, on every worker"
                )
            update.supersede(None)
        self._is_left = False

    def _open(self) -> Update:
        self.machinery.optimizer.check()
        if not self.machinery.is_whole:
            raise MisusedTrainer(
                "an update was applied in part, or the workers' parameters differ: this model can be trained no "
                "further; make a new trainer, and resume from the last checkpoint"
            )
        plan = self._plan_next()
        if self.engine.rank == 0:
            self._phase_log.show(plan, self.engine.size)
        if (lead := self._recorder.lead) is not None:
            lead.begin_update()
        self._standing.stage = "compute"
        self._is_astray, self._num_evaluations = False, 0
        requests = plan.passes(rank=self.engine.rank, size=self.engine.size, width=self._progress.width)
        return Update(plan, requests, self.machinery, self)

    def _plan_next(self) -> UpdatePlan:
        """The update that comes next; it is noted what it asks of the world."""
        known = self._plan
        if known is None or known.start != self._progress.position:
            values = None if known is None or known.start > self._progress.position else known.values
            self._plan = known = plan_update(
                self._schedule, self._progress.num_updates, self._progress.position, values
            )
            self._standing.num_micro_batches = known.num_micro_batches
        return known

    def wishes(self) -> Wishes:
        """What to ask of the others in the header of the update under way."""
        self._wished = self._membership.wishes()
        if self._progress.stop_wanted is not None:
            self._wished = replace(self._wished, stop=self._progress.stop_wanted)
        return self._wished

    def on_signal(self, name: str) -> None:
        """Leave, if this worker alone is meant and the others can go on; else stop."""
        if name != signal.Signals.SIGTERM.name or not self._membership.leave():
            self._progress.stop_wanted = name

    def on_commit(self, update: Update) -> None:
        """Note that an update has committed."""
        progress, engine = self._progress, self.machinery.engine
        progress.position, progress.num_updates = update.plan.stop, update.plan.index + 1
        progress.origin, progress.header = engine.generation, update.committed_header
        for part in self._state.attached:
            if hasattr(part, "after_update"):
                part.after_update(update.global_batch_size)
        self.machinery.is_whole = True  # whatever becomes of the records
        self._recorder.update(update, engine, self.machinery.estimator)
        standing = self._standing
        standing.update, standing.position, standing.stage = progress.num_updates, progress.position, "user"
        if not self.finished:
            self._plan_next()
        if engine.rank == 0:
            self._membership.progress(self._recorder.last_record)

    def on_broken(self, update: Update) -> Header | None:
        """The world broke in an update: enter the next one. Gives the header if the others have committed it."""
        self._enter_next_world(broken=True)
        return self._header_from_others(update)

    def _header_from_others(self, update: Update) -> Header | None:
        """After a change of worlds: the header of an update that others have committed; None: it comes again."""
        if self._progress.num_updates > update.index:
            self._is_astray = True  # who committed it may be further in the user's code
            return self._progress.header
        self._record_repetition()
        return None

    def _settle(self, update: Update) -> None:
        """After the user's turn: act on how the update ended."""
        if update.outcome is Outcome.OPEN:
            if isinstance(update.error, MisusedTrainer):
                raise update.error
            raise MisusedTrainer("update.step() was not called; call it once at the end of each update")
        try:
            if update.outcome is Outcome.VOID:
                self._repeat(update)
            elif update.outcome in (Outcome.COMMITTED, Outcome.SKIPPED):
                self._after_commit(update)
            elif update.outcome is Outcome.RECEIVED:
                self._checkpoint_if_due(update)
        except WorldBroken:
            self._enter_next_world(broken=True)

    def _repeat(self, update: Update) -> None:
        """Hear what failed on whom; repeat the update, or stop everywhere with the error."""
        failures = exchange(self.engine, update.failure, self.machinery.device)
        worst = max(failure.severity for failure in failures.values())
        if worst is Severity.FINAL or (worst is Severity.ONCE and self._failed_update == update.index):
            if isinstance(update.error, MisusedTrainer):
                raise update.error
            raise WorkerFailed(f"update {update.index}", texts(failures)) from update.error
        for rank, text in texts(failures).items():
            logger.warning("update %d is repeated: worker %d: %s", update.index, rank, text)
        if worst is Severity.ONCE:
            self._failed_update = update.index
        if update.failure is not None and update.failure.severity is Severity.NARROWER:
            self._progress.width = 1
        self._record_repetition()
        self.restart_source()

    def _record_repetition(self) -> None:
        if (lead := self._recorder.lead) is not None:
            lead.repeated()

    def _after_commit(self, update: Update) -> None:
        if self.engine.generation != self._progress.origin:
            self._checkpoint_if_due(update)
            return  # the next world knows nothing of what this header agreed on: who wished it says it again
        every = self._options.check_every
        if every and self._progress.num_updates % every == 0:
            try:
                require_same_parameters(self.engine, self.machinery.optimizer.parameters, update.index)
            except WorkersDiverged:
                self.machinery.is_whole = False
                raise
        header = update.committed_header
        if header.stop:
            self._progress.stop_reason = self._wished.stop or "another worker asked for it"
        elif header.everybody_leaves:
            self._everybody_left = True
            self._progress.stop_reason = "every worker was told to leave"
        self._checkpoint_if_due(update)
        if self._progress.stop_reason is not None or self.finished:
            return
        if header.num_leaving and self._wished.leave:
            self._depart()
        if header.num_leaving or header.regroup:
            self._enter_next_world(broken=False)

    def _checkpoint_if_due(self, update: Update) -> None:
        if (lead := self._recorder.lead) is not None:
            lead.maybe_checkpoint(
                self._state.collect, update.plan.start, self._progress.position, self._progress.num_updates
            )

    def _depart(self) -> None:
        """Leave the world at this boundary; the others go on."""
        reach("leave.start")
        if (lead := self._recorder.lead) is not None:
            lead.flush()
        self.engine.close()
        self._say_goodbye()

    def _say_goodbye(self) -> NoReturn:
        self._standing.ended = "left"
        self._membership.close()
        self._recorder.close()  # a checkpoint may still be on its way to the disk, and nobody waits for that
        raise LeftWorld("this worker was told to leave", job_is_complete=False)

    def _conclude(self) -> bool:
        """End together: nobody goes before the last state is saved, and known to be.

        Returns:
            False if the world broke before all knew it, and there is another one.
        """
        progress = self._progress
        self._standing.stage = "end"
        error: Exception | None = None
        try:
            self._record_end()
        except (ElasticBatchError, OSError) as caught:
            error = caught
        try:
            failures = exchange(self.engine, judge(error, 1) if error else None, self.machinery.device)
        except WorldBroken:
            if error is not None:
                raise error from None
            # The next world may have workers that know nothing of a stop: they have to agree on it once more.
            progress.stop_wanted = progress.stop_wanted or progress.stop_reason
            progress.stop_reason, self._everybody_left = None, False
            self._enter_next_world(broken=True)
            return False
        if failures:
            raise error or WorkerFailed("the end", texts(failures))
        self._is_astray, self._num_evaluations = False, 0
        progress.stop_wanted = None
        stopped: Departure = "left" if self._everybody_left else "stopped"
        self._standing.stage, self._standing.ended = "user", "finished" if self.finished else stopped
        return True

    def _record_end(self) -> None:
        if (lead := self._recorder.lead) is None:
            return
        collect = self._state.collect if self.machinery.is_whole else None
        lead.finish(collect, self._progress.position, self._progress.num_updates, self._progress.stop_reason)

    def evaluate_in_next_world(self) -> None:
        """The world broke in an evaluation: enter the next one, and go on in it if all its workers are at the same."""
        # Workers that joined meanwhile are at an update: they wait there, so the others evaluate each alone.
        self._is_astray |= not self._enter_next_world(broken=True, evaluating=self._num_evaluations)
        update = self._update
        if update is not None and update.outcome is Outcome.OPEN:
            update.supersede(self._header_from_others(update))  # it was begun, and is of the world that ended

    def _enter_next_world(self, *, broken: bool, evaluating: int = 0) -> bool:
        """Enter the next world. Returns whether all its workers are at the same evaluation."""
        ended = self.engine
        try:
            self.machinery.engine, together = self._worlds.next(ended, broken=broken, evaluating=evaluating)
        except (ElasticBatchError, LeftWorld) as error:
            self._save_alone(ended, error, broken=broken)
            raise
        self.restart_source()
        return together

    def _save_alone(self, ended: Engine, error: ElasticBatchError | LeftWorld, *, broken: bool) -> None:
        """There is no next world for this worker: see that its state outlives it, as far as that is not seen to."""
        progress = self._progress
        is_complete = isinstance(error, LeftWorld) and error.code == 0
        if self._membership.is_elastic and self.machinery.is_whole and progress.origin >= 0 and not is_complete:
            with self._standing.busy():
                self._recorder.save_alone(self._state.collect, progress, ended, broken=broken)

    def restart_source(self) -> None:
        """Let batches come from this worker's place in the world, at the position where it stands."""
        engine = self.machinery.engine
        self.machinery.source.start(
            forecast(
                self._schedule,
                self._progress.position,
                rank=engine.rank,
                size=engine.size,
                width=self._progress.width or 1,
            )
        )

    def close(self) -> None:
        """Give back what training holds, and the world."""
        self.machinery.source.close()
        self.machinery.gradients.close()
        self.engine.close()
