"""One update as a transaction: run this worker's share, reduce, then commit on every worker or on none."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from elastic_batch.data import PassRequest
from elastic_batch.engines import Wishes
from elastic_batch.errors import MisusedTrainer, NonFinite, WorldBroken
from elastic_batch.failpoints import reach
from elastic_batch.trainer.failures import Failure
from elastic_batch.trainer.header import Header, unpack
from elastic_batch.trainer.machinery import Machinery
from elastic_batch.trainer.plan import UpdatePlan
from elastic_batch.trainer.share_run import ShareRun


class Outcome(Enum):
    """How an update ended on this worker."""

    OPEN = "open"
    COMMITTED = "committed"
    SKIPPED = "skipped"
    """Its samples are consumed, its gradient was not applied: overflow, not finite, or nothing that counts."""
    VOID = "void"
    """A worker could not run its share; nothing was changed anywhere."""
    REPEATED = "repeated"
    """The world broke, and in the next one the update comes again."""
    RECEIVED = "received"
    """The world broke when others had committed already; their state came with the next one."""


class UpdateOwner(Protocol):
    """Whoever opens updates."""

    def wishes(self) -> Wishes:
        """What to ask of the other workers in the header."""

    def on_commit(self, update: Update) -> None:
        """The update has committed; `step` is about to return. Makes the state whole: position and all."""

    def on_broken(self, update: Update) -> Header | None:
        """The world broke: enter the next one. Gives the update's header if the others have committed it there."""


class Update:
    """One update of this worker: iterate over it, call `backward` for each batch, then `step` once.

    Not made by users: `Trainer.updates()` yields them. An update that did not commit is yielded again.

    Args:
        plan: Samples and settings.
        requests: This worker's passes.
        machinery: What it works with.
        owner: Is asked for wishes and told how it went.
    """

    def __init__(
        self,
        plan: UpdatePlan,
        requests: list[PassRequest],
        machinery: Machinery,
        owner: UpdateOwner,
    ) -> None:
        self.plan = plan
        self.outcome = Outcome.OPEN
        self.header: Header | None = None
        self._machinery = machinery
        self._owner = owner
        self._is_stepped = False
        self._marks = [time.monotonic()]
        self._share = ShareRun(plan, requests, machinery)

    @property
    def index(self) -> int:
        """Number of updates before this one."""
        return self.plan.index

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the update's first sample; where the update ends an epoch, the one that it ends."""
        return self.plan.epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether the last sample of an epoch is in this update."""
        return self.plan.ends_epoch

    @property
    def global_batch_size(self) -> int:
        """Samples of this update over all workers."""
        return self.plan.stop - self.plan.start

    @property
    def has_failed(self) -> bool:
        """Whether `step` ended with an error."""
        return self._is_stepped and self.outcome is Outcome.OPEN

    @property
    def is_reducing(self) -> bool:
        """Whether reductions with other workers may have begun."""
        return self._machinery.engine.size > 1 and self._share.has_run_all

    @property
    def was_skipped(self) -> bool:
        """Whether its samples were consumed without a step: after an overflow, say."""
        return self.outcome is Outcome.SKIPPED

    @property
    def loss(self) -> float:
        """Mean loss over the update, weighted as the gradient; after a commit."""
        header = self.committed_header
        return header.loss_sum / header.weight if header.weight else math.nan

    @property
    def gradient_norm(self) -> float:
        """Norm of the divided gradient before clipping; after a commit."""
        header = self.committed_header
        return header.gradient_norm / header.weight if header.weight else math.nan

    def __iter__(self) -> Iterator[Any]:
        """This worker's batches, on its device, each under the random seeds of its position.

        Those that are the first of their kind come some times more, whole and in parts (see `FirstBatches`).
        """
        return self._share.batches()

    def backward(self, loss: Tensor, weight: Tensor | float | None = None) -> None:
        """Add the gradient of one batch.

        Args:
            loss: 0-dim. Without `weight` the mean over the batch's samples; with it a sum.
            weight: What the sum is to be divided by in the end: samples or tokens that count. It may be 0.

        Raises:
            MisusedTrainer: There is no batch under way, or the loss is not a scalar.
        """
        self._share.backward(loss, weight)

    def fail(self, error: Exception) -> None:
        """Give this worker's share up: all workers will hear of it in the header and repeat the update."""
        self._share.fail(error)

    @property
    def failure(self) -> Failure | None:
        """Why this worker gave its share up."""
        return self._share.failure

    @property
    def error(self) -> Exception | None:
        """What `failure` came from."""
        return self._share.error

    def supersede(self, header: Header | None) -> None:
        """Another world has begun: what this worker has of the update belongs to none.

        Args:
            header: The update's, if the others have committed it; None: it comes again.
        """
        self._share.cut_off()
        self.header = header
        self.outcome = Outcome.REPEATED if header is None else Outcome.RECEIVED

    def step(self) -> bool:
        """Reduce over the workers and commit.

        Returns:
            True if the update committed; False if it will be yielded again.

        Raises:
            MisusedTrainer: Called twice.
            NonFinite: The loss or the gradient is not finite, on every worker alike; nothing was applied.
        """
        if self._is_stepped:
            raise MisusedTrainer("update.step() was called twice for one update")
        self._is_stepped = True
        if self.outcome in (Outcome.REPEATED, Outcome.RECEIVED):
            return self.header is not None
        self._share.finish()
        if self._share.is_cut_off:
            return self._after_break()
        self._marks.append(time.monotonic())
        try:
            header, statistics = self._reduce()
        except WorldBroken:
            return self._after_break()
        if header.num_workers != self._machinery.engine.size:
            return self._after_break()  # some of those who sent theirs are in another world
        if header.num_failed:
            self.outcome = Outcome.VOID
            return False
        self._marks.append(time.monotonic())
        self._commit(header, statistics)
        return True

    @property
    def step_seconds(self) -> dict[str, float]:
        """Time of this worker's share, of waiting for the reductions, and since: the commit. While it commits."""
        started, computed, reduced = self._marks
        now = time.monotonic()
        return {"compute": computed - started, "reduce": reduced - computed, "commit": now - reduced}

    def _reduce(self) -> tuple[Header, Tensor]:
        machinery = self._machinery
        share, engine = self._share, machinery.engine
        gradients = share.gradients
        machinery.standing.stage = "reduce"
        reach("reduce.start")
        try:
            share.flush()
            packed = machinery.tally.pack(
                failed=share.failure is not None,
                wishes=self._owner.wishes(),
                seen=gradients.seen,
                statistics=machinery.statistics.sums(),
                divisor=share.divisor,
            )
            reach("reduce.header")
            handle = engine.all_reduce(packed)
        except WorldBroken:
            with suppress(WorldBroken):
                gradients.wait()
            raise
        gradients.wait()
        handle.wait()
        return unpack(packed, gradients.norms(), machinery.gradients.num_parameters, divisor=share.divisor)

    def _commit(self, header: Header, statistics: Tensor) -> None:
        machinery = self._machinery
        if header.weight < 0:
            raise MisusedTrainer(
                f"the weights of update {self.plan.index} sum to {header.weight:g}; a weight counts what a loss was "
                "summed over, so it is at least 0"
            )
        weighed = math.isfinite(header.weight)
        finite_loss, finite_gradient = math.isfinite(header.loss_sum), math.isfinite(header.gradient_norm)
        is_sound = weighed and finite_loss and finite_gradient
        overflow = machinery.scaler.may_overflow and weighed and finite_loss and not finite_gradient
        if not (is_sound or overflow) and machinery.on_non_finite == "stop":
            what = "the gradient" if weighed and finite_loss else "the loss" if weighed else "the weight"
            raise NonFinite(what, self.plan.index, machinery.secure())
        self.header = header
        machinery.standing.stage = "commit"
        reach("commit.start")
        machinery.is_whole = False
        if is_sound and header.weight > 0:
            self._apply(header, statistics)
            self.outcome = Outcome.COMMITTED
        else:
            self.outcome = Outcome.SKIPPED
        machinery.scaler.record(overflow=overflow)
        reach("commit.done")
        self._owner.on_commit(self)

    def _apply(self, header: Header, statistics: Tensor) -> None:
        machinery = self._machinery
        factor = self._share.divisor / header.weight
        if machinery.max_grad_norm is not None:
            # As torch.nn.utils.clip_grad_norm_ does, its guard against a norm of 0 included.
            factor *= min(1.0, machinery.max_grad_norm / (header.gradient_norm / header.weight + 1e-6))
        self._share.gradients.finish(factor, header.seen)
        machinery.optimizer.step(self.plan.values)
        machinery.statistics.commit(statistics)
        if machinery.estimator is not None:
            samples = self.plan.stop - self.plan.start
            machinery.estimator.add(header.noise_sums(self.plan.num_samples * header.weight / samples), samples)

    def _after_break(self) -> bool:
        self.supersede(self._owner.on_broken(self))
        return self.header is not None

    @property
    def committed_header(self) -> Header:
        if self.header is None:
            raise MisusedTrainer("an update's loss and gradient norm are known after it has committed")
        return self.header
