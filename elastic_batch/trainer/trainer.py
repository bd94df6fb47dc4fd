"""The update loop: what a user drives, or iterates over."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from elastic_batch.checkpoint import Checkpoint
from elastic_batch.data import count_samples
from elastic_batch.engines import Engine, Membership, open_membership
from elastic_batch.errors import (
    ElasticBatchError,
    MisusedTrainer,
    WorkerFailed,
    WorkersDiverged,
    WorldBroken,
)
from elastic_batch.ghost import RunningStatistics
from elastic_batch.gradients import GradientBuckets
from elastic_batch.schedule import ScheduleContext, ScheduleSpec
from elastic_batch.trainer.agreement import agree_on_model, agree_on_position, require_same_parameters
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
from elastic_batch.trainer.failures import Severity, exchange, judge, texts
from elastic_batch.trainer.header import Tally
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.passes import LossFn, settle_width
from elastic_batch.trainer.phase_log import PhaseLog
from elastic_batch.trainer.plan import forecast, plan_update
from elastic_batch.trainer.precision import LossScaler, autocast
from elastic_batch.trainer.recorder import Recorder
from elastic_batch.trainer.saving import SavedState, Stateful, find_checkpoint
from elastic_batch.trainer.signals import stopping_on_signals
from elastic_batch.trainer.steering import SteeredOptimizer
from elastic_batch.trainer.stochastic import PassRandomness
from elastic_batch.trainer.update import Machinery, Outcome, Update

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model by a batch schedule, alike on any number of workers.

    Drive it with a loop of your own over `updates()`, or pass `loss_fn` and iterate over the trainer itself.

    Args:
        model: Converted in place: batch norms become ghost batch norms. It may be compiled, not wrapped for data
        parallelism. optimizer: Trains the model's parameters; the schedule sets its learning rate and momentum.
        train_set: Map-style data set. schedule: What `from_lr_scheduler` gives, or a specification of
        `elastic_batch.schedule`. loss_fn: Gives a batch's loss, where the trainer owns the step. membership: Where
        worlds come from. None: the world that a launcher's environment describes. options: Every field of
        `TrainerOptions` is a keyword argument; `micro_batch_size` is required.

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
        self.position = 0
        self.num_updates = 0
        self.stop_reason: str | None = None
        self._membership = membership
        self._scaler = LossScaler(self.options.precision, self.options.micro_batch_size)
        self._estimator = make_estimator(self.options, self.schedule)
        parts: dict[str, Stateful] = {"optimizer": self._optimizer, "scaler": self._scaler}
        self._state = SavedState(self._plain_model, parts | ({"noise": self._estimator} if self._estimator else {}))
        self._recorder = Recorder(self.options, self.schedule, fingerprint(self.options, self.schedule, optimizer))
        self._machinery: Machinery | None = None
        self._width = 1
        self._width_is_settled = self.options.micro_batches_per_pass == 1
        self._stop_wanted: str | None = None
        self._failed_update: int | None = None
        self._mean_unchecked = self.options.check_loss
        self._phase_log = PhaseLog(self.schedule.rule, self.options.spares)

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
        if not self._width_is_settled:
            self._width = settle_width(self.options, self.schedule, self.position, self.model, self._loss_fn, machinery)
            self._width_is_settled = True
        self._restart_source(machinery)
        self.stop_reason = None
        with stopping_on_signals(self.stop):
            try:
                while not self.finished and self.stop_reason is None:
                    update = self._open(machinery)
                    yield update
                    self._settle(machinery, update)
            except GeneratorExit:
                self.stop_reason = "the loop over the updates was left"
                raise
            finally:
                collect = self._state.collect if machinery.is_whole else None
                self._recorder.finish(collect, self.position, self.num_updates, self.stop_reason)

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

        while True:
            try:
                means = evaluate(
                    machinery.engine,
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
                self._enter_next_world(machinery)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> Machinery:
        """Enter the world and take up the run, once."""
        if self._machinery is not None:
            return self._machinery
        membership = self._membership or open_membership(self._device)
        engine = membership.first()
        self._take_up(engine)
        self._machinery = Machinery(
            model=self._plain_model,
            device=self._device,
            seed=self.options.seed,
            precision=self.options.precision,
            max_grad_norm=self.options.max_grad_norm,
            on_non_finite=self.options.on_non_finite,
            membership=membership,
            engine=engine,
            source=open_training_source(self._train_set, self.options, self._device),
            buckets=GradientBuckets(self._optimizer.parameters),
            tally=Tally(self._device),
            statistics=RunningStatistics(self._plain_model),
            randomness=PassRandomness(self._plain_model),
            optimizer=self._optimizer,
            scaler=self._scaler,
            estimator=self._estimator,
            stop_wanted=lambda: self._stop_wanted is not None,
            last_checkpoint=lambda: self._recorder.last_checkpoint,
            mean_check_due=self._mean_check_due,
        )
        return self._machinery

    def _take_up(self, engine: Engine) -> None:
        """Open the run directory and load the checkpoint to resume from; all workers raise what one of them meets."""
        error: Exception | None = None
        checkpoint: Checkpoint | None = None
        try:
            checkpoint = find_checkpoint(os.fspath(self.options.resume), self._recorder.checkpoint_location)
            if checkpoint is not None:
                self._recorder.resume(checkpoint)
                self._state.restore(checkpoint.state)
                self.position, self.num_updates = checkpoint.manifest.position, checkpoint.manifest.update
            if engine.rank == 0:
                self._recorder.open(engine.generation)
        except (ElasticBatchError, OSError) as caught:
            error = caught
        failures = exchange(engine, judge(error, 1) if error else None, self._device)
        if error is not None:
            raise error
        if failures:
            raise WorkerFailed("the start", texts(failures))
        agree_on_position(engine, self.position, self._device)
        if checkpoint is None:
            agree_on_model(engine, self._plain_model)
        else:
            logger.info(
                "resumed %s at position %d, update %d", checkpoint.manifest.name, self.position, self.num_updates
            )

    def _open(self, machinery: Machinery) -> Update:
        self._optimizer.check()
        plan = plan_update(self.schedule, self.num_updates, self.position)
        self._phase_log.show(plan, machinery.engine.size)
        self._recorder.begin_update()
        requests = plan.passes(rank=machinery.engine.rank, size=machinery.engine.size, width=self._width)
        return Update(plan, requests, machinery, self._on_commit)

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
        self.position, self.num_updates = update.plan.stop, update.plan.index + 1
        for part in self._state.attached:
            if hasattr(part, "after_update"):
                part.after_update(update.global_batch_size)
        assert self._machinery is not None
        self._recorder.update(update, self._machinery.engine, self._estimator)

    def _settle(self, machinery: Machinery, update: Update) -> None:
        """After the user's turn: act on how the update ended."""
        if update.outcome is Outcome.OPEN:
            raise MisusedTrainer("update.step() was not called; call it once at the end of each update")
        try:
            if update.outcome is Outcome.VOID:
                self._repeat(machinery, update)
            elif update.outcome is not Outcome.BROKEN:
                self._after_commit(machinery, update)
        except WorldBroken:
            update.outcome = Outcome.BROKEN
        if update.outcome is Outcome.BROKEN:
            self._recorder.repeated()
            self._enter_next_world(machinery)

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
            self._width = 1
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
        if header.stop:
            self.stop_reason, self._stop_wanted = self._stop_wanted or "another worker asked for it", None
        self._recorder.maybe_checkpoint(self._state.collect, update.plan.start, self.position, self.num_updates)
        if header.leave or header.regroup:
            self._enter_next_world(machinery)

    def _enter_next_world(self, machinery: Machinery) -> None:
        ended = machinery.engine
        machinery.engine = machinery.membership.next(ended)
        agree_on_position(machinery.engine, self.position, self._device)
        self._restart_source(machinery)

    def _restart_source(self, machinery: Machinery) -> None:
        engine = machinery.engine
        machinery.source.start(
            forecast(self.schedule, self.position, rank=engine.rank, size=engine.size, width=self._width)
        )

    def _mean_check_due(self) -> bool:
        due, self._mean_unchecked = self._mean_unchecked, False
        return due
