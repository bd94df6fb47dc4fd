"""The update loop: what a user drives, or iterates over."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from elastic_batch.checkpoint import check_state
from elastic_batch.data import count_samples
from elastic_batch.engines import Engine, Membership, Standing, open_membership
from elastic_batch.errors import InvalidSetting, MisusedTrainer, WorldBroken
from elastic_batch.ghost import RunningStatistics
from elastic_batch.gradients import GradientSums
from elastic_batch.schedule import ScheduleContext, ScheduleSpec
from elastic_batch.trainer.assembly import (
    convert_norms,
    fingerprint,
    make_deterministic,
    make_estimator,
    open_training_source,
    refuse_wrapped,
    require_parameters,
    require_schedule,
    require_trained_inside,
)
from elastic_batch.trainer.evaluation import UNNAMED, Measure, evaluate, name_of
from elastic_batch.trainer.first_batches import FirstBatches
from elastic_batch.trainer.header import Tally
from elastic_batch.trainer.heap import keep_freed_memory
from elastic_batch.trainer.loop import UpdateLoop
from elastic_batch.trainer.machinery import Machinery
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.passes import LossFn, settle_width
from elastic_batch.trainer.plan import forecast
from elastic_batch.trainer.precision import Autocast, LossScaler
from elastic_batch.trainer.progress import Progress
from elastic_batch.trainer.recorder import Recorder
from elastic_batch.trainer.saving import SavedState, Stateful
from elastic_batch.trainer.seeding import PassSeeds
from elastic_batch.trainer.signals import stopping_on_signals
from elastic_batch.trainer.steering import SteeredOptimizer
from elastic_batch.trainer.stochastic import PassRandomness, is_compiled
from elastic_batch.trainer.update import Update
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
        if loss_fn is not None and not callable(loss_fn):
            raise InvalidSetting("loss_fn", loss_fn, "must be a function of (model, batch)")
        if self.options.deterministic:
            make_deterministic()
        self.model = model
        self._plain_model: nn.Module = getattr(model, "_orig_mod", model)
        self._device = require_parameters(self._plain_model)[0].device
        if self._device.type == "cpu":
            keep_freed_memory()
        self._loss_fn = loss_fn
        self._train_set = train_set
        self._optimizer = SteeredOptimizer(
            optimizer,
            momentum=self.options.momentum,
            is_adaptive=self.options.adaptive_optimizer,
            momentum_correction=self.options.momentum_correction,
        )
        require_trained_inside(self._plain_model, self._optimizer)
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
        self._optimizer.require_momenta([phase.momentum for phase in self.schedule.phases])
        self._membership = membership
        self._progress = Progress(width=1 if self.options.micro_batches_per_pass == 1 else 0)
        self._standing = Standing()
        self._scaler = LossScaler(self.options.precision, self.options.micro_batch_size)
        self._estimator = make_estimator(self.options, self.schedule)
        parts: dict[str, Stateful] = {"optimizer": self._optimizer, "scaler": self._scaler}
        self._state = SavedState(self._plain_model, parts | ({"noise": self._estimator} if self._estimator else {}))
        what_matters = fingerprint(self.options, self.schedule, self._optimizer, self._plain_model)
        self._recorder = Recorder(self.options, self.schedule, what_matters)
        self._loop: UpdateLoop | None = None

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
    def generation(self) -> int:
        """Which world this worker is in. It blocks until there is one."""
        return self._begin().engine.generation

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
        self._progress.stop_wanted = reason

    def updates(self) -> Iterator[Update]:
        """Yield update after update until the schedule's end; one that did not commit is yielded again.

        Raises:
            MisusedTrainer: User code broke a rule; the message says which.
            NonFinite: Loss or gradient is not finite.
            WorkerFailed: A worker failed twice at the same update.
            WorkersDiverged: The workers' parameters differ.
            WorldBroken: A worker was lost and there is no next world.
        """
        loop = self._begin()
        if not self._progress.width:
            with stopping_on_signals(loop.on_signal), self._standing.busy():
                self._progress.width = settle_width(
                    self.options, self.schedule, self.position, self.model, self._loss_fn, loop.machinery
                )
        yield from loop.run()

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
        loop = self._begin()

        def under_autocast(model: nn.Module, batch: Any) -> Any:
            with loop.machinery.autocast.forward():
                return measure(model, batch)

        loop.begin_evaluation()
        while True:
            self._standing.stage = "evaluate"
            try:
                with self._standing.busy():
                    means = evaluate(
                        loop.evaluation_engine,
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
                loop.evaluate_in_next_world()
        self._standing.stage = "user"
        named = {name or name_of(measure): mean for name, mean in means.items()}
        if (lead := self._recorder.lead) is not None:
            lead.evaluation(named, self.position, self.num_updates)
        return means.get(UNNAMED, means)

    def close(self) -> None:
        """Give everything back: data processes, records, the optimizer and the world."""
        with ExitStack() as ending:  # whichever of them fails, the others are closed; the last one first
            if self._membership is not None:
                ending.callback(self._membership.close)
            if self._loop is not None:
                ending.callback(self._loop.close)
            ending.callback(self._optimizer.close)
            ending.callback(self._recorder.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> UpdateLoop:
        """Enter the world and take up the run, once."""
        if self._loop is not None:
            return self._loop
        self._membership = self._membership or open_membership(self._device)
        self._recorder.report = self._membership.progress
        if self._membership.is_elastic or self._recorder.checkpoints.location is not None:
            check_state(self._state.collect())  # now, and not when the first checkpoint is due
        worlds = Worlds(
            self._membership,
            self._device,
            self.options,
            self.schedule,
            self._state,
            self._progress,
            self._recorder,
            self._standing,
        )
        source = open_training_source(self._train_set, self.options, self._device)
        if self._membership.is_elastic:
            # Data processes start now, while nobody waits for this worker; they outlive what they are told to load.
            source.start(forecast(self.schedule, 0, rank=0, size=1, width=1))
        engine, statistics = self._enter_first(worlds), RunningStatistics(self._plain_model)
        check_loss = self.options.check_loss and self.num_updates == 0
        machinery = Machinery(
            model=self._plain_model,
            device=self._device,
            seed=self.options.seed,
            seeds=PassSeeds(self._device),
            autocast=Autocast(self.options.precision, self._device),
            max_grad_norm=self.options.max_grad_norm,
            on_non_finite=self.options.on_non_finite,
            engine=engine,
            source=source,
            gradients=GradientSums(self._optimizer.parameters),
            tally=Tally(self._device),
            statistics=statistics,
            first_batches=FirstBatches(self._plain_model, self._optimizer, statistics, check_loss=check_loss),
            randomness=PassRandomness(self._plain_model),
            optimizer=self._optimizer,
            scaler=self._scaler,
            estimator=self._estimator,
            standing=self._standing,
            secure=lambda: self._recorder.secure(self._state.collect, self._progress),
        )
        self._loop = UpdateLoop(
            membership=self._membership,
            worlds=worlds,
            machinery=machinery,
            schedule=self.schedule,
            options=self.options,
            progress=self._progress,
            standing=self._standing,
            state=self._state,
            recorder=self._recorder,
            compiles=is_compiled(self.model),
        )
        return self._loop

    def _enter_first(self, worlds: Worlds) -> Engine:
        """Wait for a world. A worker that is told to end meanwhile leaves in good order: nobody counts it as lost."""
        membership = self._membership
        assert membership is not None
        if not membership.is_elastic:
            return worlds.first()

        def leave(_: str) -> None:
            membership.leave()

        with stopping_on_signals(leave, [signal.SIGTERM]):
            return worlds.first()

    def _run_share(self, update: Update, loss_fn: LossFn) -> None:
        for batch in update:
            try:
                loss = loss_fn(self.model, batch)
                if not isinstance(loss, tuple):
                    update.backward(loss)
                elif len(loss) == 2:
                    update.backward(*loss)
                else:
                    raise MisusedTrainer(f"loss_fn gave {len(loss)} values; it must give a loss, or (sum, weight)")
            # Whatever it is, the others must hear of it, or they would wait for this worker in a reduction.
            except Exception as error:
                update.fail(error)
