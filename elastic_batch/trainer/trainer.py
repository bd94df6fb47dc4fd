"""The update loop: what a user drives, or iterates over."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from elastic_batch.data import count_samples
from elastic_batch.engines import Membership, SoloEngine, Standing, Wishes, open_membership
from elastic_batch.errors import LeftWorld, MisusedTrainer, WorkerFailed, WorkersDiverged, WorldBroken
from elastic_batch.failpoints import reach
from elastic_batch.ghost import RunningStatistics
from elastic_batch.gradients import GradientBuckets
from elastic_batch.schedule import ScheduleContext, ScheduleSpec
from elastic_batch.trainer.agreement import require_same_parameters
from elastic_batch.trainer.assembly import (
    convert_norms,
    fingerprint,
    make_deterministic,
    make_estimator,
    open_training_source,
    refuse_wrapped,
    require_schedule,
)
from elastic_batch.trainer.evaluation import Measure, evaluate
from elastic_batch.trainer.failures import Severity, exchange, texts
from elastic_batch.trainer.header import Header, Tally
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.passes import LossFn, settle_width
from elastic_batch.trainer.phase_log import PhaseLog
from elastic_batch.trainer.plan import UpdatePlan, forecast, plan_update
from elastic_batch.trainer.precision import LossScaler, autocast
from elastic_batch.trainer.progress import Progress
from elastic_batch.trainer.recorder import Recorder
from elastic_batch.trainer.saving import SavedState, Stateful
from elastic_batch.trainer.signals import stopping_on_signals
from elastic_batch.trainer.steering import SteeredOptimizer
from elastic_batch.trainer.stochastic import PassRandomness
from elastic_batch.trainer.update import Machinery, Outcome, Update
from elastic_batch.trainer.worlds import Worlds

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model by a batch schedule, alike on any number of workers.

    Drive it with a loop of your own over `updates()`, or pass `loss_fn` and iterate over the trainer itself.

    Args:
        model: Converted in place: batch norms become ghost batch norms. It may be compiled, not wrapped for data
            parallelism.
        optimizer: Trains the model's parameters; the schedule sets its learning rate and momentum.
        train_set: Map-style data set.
        schedule: What `from_lr_scheduler` gives, or a specification of `elastic_batch.schedule`.
        loss_fn: Gives a batch's loss, where the trainer owns the step.
        membership: Where worlds come from. None: a coordinator's session or the world that a launcher's environment
            describes, else this process alone.
        options: Every field of `TrainerOptions` is a keyword argument; `micro_batch_size` is required.

    Raises:
        InvalidSetting: Something cannot be trained as asked; the message says why and what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train_set: Dataset[Any],
        schedule: ScheduleSpec,
        *,
        loss_fn: LossFn | None = None,
        membership: Membership | None = None,
        **options: Any,
    ) -> None:
        self.options = TrainerOptions.of(**options)
        refuse_wrapped(model)
        require_schedule(schedule)
        if self.options.deterministic:
            make_deterministic()
        self.model = model
        self._plain_model: nn.Module = getattr(model, "_orig_mod", model)
        self._device = next(self._plain_model.parameters()).device
        self._loss_fn = loss_fn
        self._train_set = train_set
        self._optimizer = SteeredOptimizer(optimizer, momentum_correction=self.options.momentum_correction)
        convert_norms(self._plain_model, self.options)
        if self.options.compile:
            model.compile()
        self.schedule = schedule.build(
            ScheduleContext(
                num_samples=count_samples(train_set, "train_set"),
                micro_batch_size=self.options.micro_batch_size,
                learning_rate=self._optimizer.base_learning_rate,
                momentum=self._optimizer.momentum,
                adaptive_optimizer=self._optimizer.is_adaptive,
                tokens_per_sample=self.options.tokens_per_sample,
            )
        )
        self._membership = membership
        self._progress = Progress(width=1 if self.options.micro_batches_per_pass == 1 else 0)
        self._standing = Standing()
        self._scaler = LossScaler(self.options.precision, self.options.micro_batch_size)
        self._estimator = make_estimator(self.options, self.schedule)
        parts: dict[str, Stateful] = {"optimizer": self._optimizer, "scaler": self._scaler}
        self._state = SavedState(self._plain_model, parts | ({"noise": self._estimator} if self._estimator else {}))
        self._recorder = Recorder(self.options, self.schedule, fingerprint(self.options, self.schedule, optimizer))
        self._machinery: Machinery | None = None
        self._worlds: Worlds | None = None
        self._wished = Wishes()
        self._stop_wanted: str | None = None
        self._has_looped = False
        self._plan: UpdatePlan | None = None
        self._failed_update: int | None = None
        self._mean_unchecked = self.options.check_loss
        self._phase_log = PhaseLog(self.schedule.rule, self.options.spares)

    @property
    def position(self) -> int:
        """Samples committed."""
        return self._progress.position

    @property
    def num_updates(self) -> int:
        """Updates committed."""
        return self._progress.num_updates

    @property
    def stop_reason(self) -> str | None:
        """Why the run stopped before its end; None if it did not."""
        return self._progress.stop_reason

    @property
    def finished(self) -> bool:
        """Whether the schedule's end is reached."""
        return self.position >= self.schedule.end

    @property
    def is_lead(self) -> bool:
        """Whether this worker writes the records: the lowest rank. It blocks until the world has formed."""
        return self._begin().engine.rank == 0

    @property
    def last_record(self) -> dict[str, Any]:
        """The newest update's line in the metrics log; empty before the first and on other workers than the lead."""
        return self._recorder.last_record

    def start(self) -> None:
        """Enter the world and take up the run: `position` is then that of the checkpoint to resume from, if any.

        Called by everything that needs it; calling it first only makes errors come earlier.

        Raises:
            ElasticBatchError: The run directory or the checkpoint cannot be used.
            WorldBroken: The other workers did not come.
        """
        self._begin()

    def attach(self, **parts: Stateful) -> None:
        """Put objects into checkpoints, by name. One with `after_update(num_samples)` is called at each commit."""
        for name, part in parts.items():
            self._state.attach(name, part)

    def stop(self, reason: str) -> None:
        """End the run after the update under way, or the next one: on all workers after the same, with a checkpoint."""
        self._stop_wanted = reason

    def updates(self) -> Iterator[Update]:
        """Yield update after update until the schedule's end; one that did not commit is yielded again.

        Raises:
            MisusedTrainer: User code broke a rule; the message says which.
            NonFinite: Loss or gradient is not finite.
            WorkerFailed: A worker failed twice at the same update.
            WorkersDiverged: The workers' parameters differ.
            WorldBroken: A worker was lost and there is no next world.
        """
        machinery = self._begin()
        progress = self._progress
        if not progress.width:
            progress.width = settle_width(
                self.options, self.schedule, self.position, self.model, self._loss_fn, machinery
            )
        self._restart_source(machinery)
        if self._has_looped:
            progress.stop_reason = None  # that loop's
        self._has_looped = True
        concluded = False
        with stopping_on_signals(self._on_signal):
            try:
                while not self.finished and progress.stop_reason is None:
                    update = self._open(machinery)
                    yield update
                    self._settle(machinery, update)
                self._conclude(machinery)
                concluded = True
            except GeneratorExit:
                progress.stop_reason = "the loop over the updates was left"
                raise
            finally:
                if not concluded:
                    self._record_end(machinery)

    def __iter__(self) -> Iterator[Update]:
        """Run update after update with `loss_fn` and yield each when it has committed.

        Raises:
            MisusedTrainer: There is no `loss_fn`.
        """
        if self._loss_fn is None:
            raise MisusedTrainer("iterating over the trainer needs loss_fn; without it, loop over trainer.updates()")
        for update in self.updates():
            self._run_share(update, self._loss_fn)
            if update.step():
                yield update

    def evaluate(self, dataset: Dataset[Any], measure: Measure, *, batch_size: int | None = None) -> Any:
        """Weighted means over a data set, sharded over the workers. All workers call it at the same place.

        Args:
            dataset: Map-style.
            measure: Of (model, batch): a (sum, weight) pair, or a dict of such pairs by name.
            batch_size: None: the micro-batch, at least 256.

        Returns:
            A float for a pair, a dict of floats for a dict.

        Raises:
            WorkerFailed: `measure` or the data failed on some worker; every worker raises it.
            WorldBroken: A worker was lost and there is no next world.
        """
        machinery = self._begin()

        def under_autocast(model: nn.Module, batch: Any) -> Any:
            with autocast(self.options.precision, self._device):
                return measure(model, batch)

        engine = machinery.engine
        while True:
            self._standing.stage = "evaluate"
            try:
                means = evaluate(
                    engine,
                    self.model,
                    dataset,
                    under_autocast,
                    device=self._device,
                    batch_size=batch_size or max(256, self.options.micro_batch_size),
                    collate_fn=self.options.collate_fn,
                    num_workers=self.options.num_workers,
                )
                break
            except WorldBroken:
                together = self._enter_next_world(machinery, broken=True, evaluating=True)
                # Workers that joined meanwhile are at an update: they wait there, so the others evaluate each alone.
                engine = machinery.engine if together else SoloEngine()
        self._standing.stage = "user"
        self._recorder.evaluation(means, self.position, self.num_updates)
        return means["value"] if list(means) == ["value"] else means

    def close(self) -> None:
        """Give everything back: data processes, records, the optimizer and the world."""
        self._recorder.close()
        self._optimizer.close()
        if self._machinery is not None:
            self._machinery.source.close()
            self._machinery.buckets.close()
            self._machinery.engine.close()
        if self._membership is not None:
            self._membership.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> Machinery:
        """Enter the world and take up the run, once."""
        if self._machinery is not None:
            return self._machinery
        self._membership = self._membership or open_membership(self._device)
        self._worlds = Worlds(
            self._membership,
            self._device,
            self.options,
            self._state,
            self._progress,
            self._recorder,
            self._standing,
        )
        engine = self._worlds.first()
        if self.num_updates:
            self._mean_unchecked = False
        self._machinery = Machinery(
            model=self._plain_model,
            device=self._device,
            seed=self.options.seed,
            precision=self.options.precision,
            max_grad_norm=self.options.max_grad_norm,
            on_non_finite=self.options.on_non_finite,
            engine=engine,
            source=open_training_source(self._train_set, self.options, self._device),
            buckets=GradientBuckets(self._optimizer.parameters),
            tally=Tally(self._device),
            statistics=RunningStatistics(self._plain_model),
            randomness=PassRandomness(self._plain_model),
            optimizer=self._optimizer,
            scaler=self._scaler,
            estimator=self._estimator,
            standing=self._standing,
            wishes=self._wishes,
            last_checkpoint=lambda: self._recorder.last_checkpoint,
            mean_check_due=self._mean_check_due,
        )
        return self._machinery

    def _open(self, machinery: Machinery) -> Update:
        self._optimizer.check()
        plan = self._plan_next()
        self._phase_log.show(plan, machinery.engine.size)
        self._recorder.begin_update()
        self._standing.stage = "compute"
        requests = plan.passes(rank=machinery.engine.rank, size=machinery.engine.size, width=self._progress.width)
        return Update(plan, requests, machinery, self._on_commit, self._on_broken)

    def _plan_next(self) -> UpdatePlan:
        """The update that comes next; it is noted what it asks of the world."""
        known = self._plan
        if known is None or known.start != self.position:
            values = None if known is None or known.start > self.position else known.values
            self._plan = known = plan_update(self.schedule, self.num_updates, self.position, values)
            self._standing.num_micro_batches = known.num_micro_batches
        return known

    def _wishes(self) -> Wishes:
        """What to ask of the others in the header of the update under way."""
        assert self._membership is not None
        self._wished = self._membership.wishes()
        if self._stop_wanted is not None:
            self._wished = replace(self._wished, stop=self._stop_wanted)
        return self._wished

    def _on_signal(self, name: str) -> None:
        """Leave, if this worker alone is meant and the others can go on; else stop."""
        assert self._membership is not None
        if name != signal.Signals.SIGTERM.name or not self._membership.leave():
            self.stop(name)

    def _run_share(self, update: Update, loss_fn: LossFn) -> None:
        for batch in update:
            try:
                loss = loss_fn(self.model, batch)
                if isinstance(loss, tuple):
                    update.backward(*loss)
                else:
                    update.backward(loss)
            # Whatever it is, the others must hear of it, or they would wait for this worker in a reduction.
            except Exception as error:
                update.fail(error)

    def _on_commit(self, update: Update) -> None:
        assert self._machinery is not None
        assert self._membership is not None
        progress, engine = self._progress, self._machinery.engine
        progress.position, progress.num_updates = update.plan.stop, update.plan.index + 1
        progress.origin, progress.header = engine.generation, update.committed_header
        for part in self._state.attached:
            if hasattr(part, "after_update"):
                part.after_update(update.global_batch_size)
        self._recorder.update(update, engine, self._estimator)
        standing = self._standing
        standing.update, standing.position, standing.stage = progress.num_updates, progress.position, "user"
        if not self.finished:
            self._plan_next()
        if engine.rank == 0:
            self._membership.progress(self._recorder.last_record)

    def _on_broken(self, update: Update) -> Header | None:
        """The world broke in an update: enter the next one. Gives the header if the others have committed it."""
        assert self._machinery is not None
        self._enter_next_world(self._machinery, broken=True)
        if self.num_updates > update.index:
            return self._progress.header
        self._recorder.repeated()
        return None

    def _settle(self, machinery: Machinery, update: Update) -> None:
        """After the user's turn: act on how the update ended."""
        if update.outcome in (Outcome.OPEN, Outcome.BROKEN):
            raise MisusedTrainer("update.step() was not called; call it once at the end of each update")
        try:
            if update.outcome is Outcome.VOID:
                self._repeat(machinery, update)
            elif update.outcome in (Outcome.COMMITTED, Outcome.SKIPPED):
                self._after_commit(machinery, update)
        except WorldBroken:
            self._enter_next_world(machinery, broken=True)

    def _repeat(self, machinery: Machinery, update: Update) -> None:
        """Hear what failed on whom; repeat the update, or stop everywhere with the error."""
        failures = exchange(machinery.engine, update.failure, self._device)
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
        self._recorder.repeated()
        self._restart_source(machinery)

    def _after_commit(self, machinery: Machinery, update: Update) -> None:
        every = self.options.check_every
        if every and self.num_updates % every == 0:
            try:
                require_same_parameters(machinery.engine, self._optimizer.parameters, update.index)
            except WorkersDiverged:
                machinery.is_whole = False
                raise
        header = update.committed_header
        if header.stop or header.everybody_leaves:
            asked_here = "every worker was told to leave" if header.everybody_leaves else self._wished.stop
            self._progress.stop_reason, self._stop_wanted = asked_here or "another worker asked for it", None
        self._recorder.maybe_checkpoint(self._state.collect, update.plan.start, self.position, self.num_updates)
        if self.stop_reason is not None or self.finished:
            return
        if header.num_leaving and self._wished.leave:
            self._depart(machinery)
        if header.num_leaving or header.regroup:
            self._enter_next_world(machinery, broken=False)

    def _depart(self, machinery: Machinery) -> None:
        """Leave the world at this boundary; the others go on."""
        assert self._membership is not None
        reach("leave.start")
        self._recorder.close()
        machinery.engine.close()
        self._standing.ended = "left"
        self._membership.close()
        raise LeftWorld("this worker was told to leave", job_is_complete=False)

    def _conclude(self, machinery: Machinery) -> None:
        """End together: nobody goes before the last state is saved, and known to be."""
        while True:
            self._standing.stage = "end"
            try:
                self._record_end(machinery)
                exchange(machinery.engine, None, self._device)
            except WorldBroken:
                self._enter_next_world(machinery, broken=True)
            else:
                break
        self._standing.stage, self._standing.ended = "user", "finished" if self.finished else "stopped"

    def _record_end(self, machinery: Machinery) -> None:
        collect = self._state.collect if machinery.is_whole else None
        self._recorder.finish(collect, self.position, self.num_updates, self.stop_reason)

    def _enter_next_world(self, machinery: Machinery, *, broken: bool, evaluating: bool = False) -> bool:
        """Enter the next world. Returns whether all its workers are evaluating."""
        assert self._worlds is not None
        machinery.engine, together = self._worlds.next(machinery.engine, broken=broken, evaluating=evaluating)
        self._restart_source(machinery)
        return together

    def _restart_source(self, machinery: Machinery) -> None:
        engine = machinery.engine
        machinery.source.start(
            forecast(self.schedule, self.position, rank=engine.rank, size=engine.size, width=self._progress.width)
        )

    def _mean_check_due(self) -> bool:
        due, self._mean_unchecked = self._mean_unchecked, False
        return due
