"""One update as a transaction: run this worker's share, reduce, then commit on every worker or on none."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from enum import Enum
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from elastic_batch.data import PassRequest
from elastic_batch.engines import Wishes
from elastic_batch.errors import MisusedTrainer, NonFinite, WorldBroken
from elastic_batch.failpoints import reach
from elastic_batch.randomness import preserved, reseed
from elastic_batch.stream import micro_batch_seed
from elastic_batch.trainer.failures import Failure, Severity, is_out_of_memory, judge
from elastic_batch.trainer.header import Header, unpack
from elastic_batch.trainer.machinery import Machinery
from elastic_batch.trainer.mean_check import MeanCheck
from elastic_batch.trainer.plan import UpdatePlan
from elastic_batch.trainer.stochastic import PassDraws


class Outcome(Enum):
    """How an update ended on this worker."""

    OPEN = "open"
    COMMITTED = "committed"
    SKIPPED = "skipped"
    """Its samples are consumed, its gradient was not applied: overflow, not finite, or nothing that counts."""
    VOID = "void"
    """A worker could not run its share; nothing was changed anywhere."""
    BROKEN = "broken"
    """The world broke; nothing was changed here."""
    REPEATED = "repeated"
    """The world broke, and in the next one the update comes again."""
    RECEIVED = "received"
    """The world broke when others had committed already; their state came with the next one."""


@lru_cache(maxsize=8)
def _factor(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a backward begins with instead of 1: cheaper than multiplying each loss."""
    return torch.full((), value, dtype=dtype, device=device)


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
        self.failure: Failure | None = None
        self.error: Exception | None = None
        self.header: Header | None = None
        self._requests = requests
        self._machinery = machinery
        self._owner = owner
        self._divisor = machinery.scaler.divisor(self.global_batch_size)
        self._num_done = 0
        self._is_iterated = self._is_stepped = False
        self._awaits_backward = False
        self._mean_check: MeanCheck | None = None
        self._draws: PassDraws | None = None
        self._marks = [time.monotonic()]
        self._gradients = machinery.gradients.begin(alone=machinery.engine.size == 1)
        machinery.tally.begin()
        machinery.statistics.begin()

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

        The first batch of a run comes some times more, whole and in halves, to check the loss (see `MeanCheck`).
        """
        machinery = self._machinery
        if self._is_iterated:
            self.fail(MisusedTrainer("an update's batches are there once; loop over it once, and keep what is needed"))
        self._is_iterated = True
        if self.is_settled:
            return
        with preserved(machinery.device):
            for request in self._requests:
                batch = self._fetch(request)
                if self.is_settled:
                    return
                if machinery.mean_unchecked:
                    machinery.mean_unchecked = False
                    yield from self._check_mean(batch, request)
                    if self.is_settled:
                        return
                machinery.statistics.samples_per_pass = self._num_samples(request)
                self._awaits_backward = True
                with self._draws_of(request), machinery.autocast.forward():
                    yield batch
                if self._awaits_backward and not self.is_settled:
                    self._check_gradients()  # it may have been loss.backward()
                if self._awaits_backward and not self.is_settled:
                    self.fail(MisusedTrainer("a batch got no update.backward(loss); call it once for each batch"))
                if self.is_settled:
                    return

    @property
    def _is_superseded(self) -> bool:
        return self.outcome in (Outcome.REPEATED, Outcome.RECEIVED)

    @property
    def is_settled(self) -> bool:
        """Whether this worker's share cannot succeed any more."""
        return self.failure is not None or self.outcome is not Outcome.OPEN

    def backward(self, loss: Tensor, weight: Tensor | float | None = None) -> None:
        """Add the gradient of one batch.

        Args:
            loss: 0-dim. Without `weight` the mean over the batch's samples; with it a sum.
            weight: What the sum is to be divided by in the end: samples or tokens that count. It may be 0.

        Raises:
            MisusedTrainer: There is no batch under way, or the loss is not a scalar.
        """
        if loss.dim() != 0:
            raise MisusedTrainer(
                f"the loss has shape {tuple(loss.shape)}; it must be one number: a mean over the batch's samples, or a "
                "sum with weight=..."
            )
        if self._mean_check is not None:
            if weight is None:
                self._mean_check.record(loss)
            return
        if self._is_superseded:
            return
        if not self._awaits_backward:
            raise MisusedTrainer("update.backward(loss) belongs inside the loop over the update, once for each batch")
        self._awaits_backward = False
        if self._draws is not None and (reason := self._draws.stray()):
            self.failure = Failure(Severity.NARROWER, f"passes have one micro-batch from here on: {reason}")
            return
        count = self._num_samples(self._requests[self._num_done]) if weight is None else 1
        try:
            self._accumulate(loss, count, count if weight is None else weight)
        except WorldBroken as error:
            self._break(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Give this worker's share up: all workers will hear of it in the header and repeat the update."""
        if self._mean_check is not None and self.failure is None:
            self._mean_check.explain()
        width = self._requests[self._num_done].num_micro_batches if self._num_done < len(self._requests) else 1
        self._awaits_backward = False
        self.error = error
        self.failure = judge(error, width)

    def supersede(self, header: Header | None) -> None:
        """Another world has begun: what this worker has of the update belongs to none.

        Args:
            header: The update's, if the others have committed it; None: it comes again.
        """
        self._awaits_backward = False
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
        if self._is_superseded:
            return self.header is not None
        if self.outcome is Outcome.BROKEN:
            return self._after_break()
        if not self.is_settled and self._num_done < len(self._requests):
            self.fail(MisusedTrainer("update.step() was called before every batch of the update was run"))
        if not self.is_settled:
            self._check_gradients()
        self._marks.append(time.monotonic())
        try:
            header, statistics = self._reduce()
        except WorldBroken as error:
            self._break(error)
            return self._after_break()
        if header.num_workers != self._machinery.engine.size:
            generation = self._machinery.engine.generation
            self._break(WorldBroken("the header counts other workers than the world has", generation))
            return self._after_break()
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

    def _check_gradients(self) -> None:
        try:
            self._gradients.check()
        except MisusedTrainer as error:
            self.fail(error)

    def _num_samples(self, request: PassRequest) -> int:
        return request.num_micro_batches * self.plan.micro_batch_size

    def _fetch(self, request: PassRequest) -> Any:
        try:
            batch = self._machinery.source.next()
            self._machinery.engine.check()
            return batch
        except WorldBroken as error:
            self._break(error)
            return None
        except Exception as error:  # of users' own batches and transforms as well: the others must hear of it
            self.fail(error)
            return None

    def _draws_of(self, request: PassRequest) -> AbstractContextManager[None]:
        """Let each of the pass's micro-batches draw at random what belongs to its position."""
        if request.num_micro_batches > 1:
            return self._draws_of_many(request)
        machinery = self._machinery
        reseed(micro_batch_seed(machinery.seed, request.start, "forward"), machinery.device)
        return nullcontext()

    @contextmanager
    def _draws_of_many(self, request: PassRequest) -> Iterator[None]:
        machinery = self._machinery
        seeds = [
            micro_batch_seed(machinery.seed, position, "forward")
            for position in range(request.start, request.start + self._num_samples(request), self.plan.micro_batch_size)
        ]
        with machinery.randomness.over(seeds, machinery.device) as self._draws:
            yield
        self._draws = None

    def _check_mean(self, batch: Any, request: PassRequest) -> Iterator[Any]:
        machinery = self._machinery
        self._mean_check = MeanCheck(machinery.model, batch, self._num_samples(request))
        try:
            with machinery.autocast.forward():
                yield from self._mean_check.parts()
            self._mean_check.verify()
        except MisusedTrainer as error:
            self.fail(error)
        except GeneratorExit:
            self._mean_check.explain()
            raise
        finally:
            self._mean_check = None

    def _accumulate(self, loss: Tensor, count: int, weight: Tensor | float) -> None:
        machinery = self._machinery
        reach("compute.pass")
        is_first, is_last = self._num_done == 0, self._num_done + 1 == len(self._requests)
        machinery.tally.add(loss, count, weight)
        engine, norms = (machinery.engine, self._norms_on_launch()) if is_last else (None, None)
        with self._gradients.accepting(engine, norms), machinery.autocast.backward():
            # A copy: what is a view of the loss gets one of this for its gradient, and sums are changed in place.
            loss.backward(_factor(count / self._divisor, loss.dtype, loss.device).clone())
        if is_first and not is_last and machinery.estimator:
            machinery.tally.first_pass_norms = self._gradients.norms()
        self._num_done += 1

    def _norms_on_launch(self) -> list[Tensor] | None:
        """Where the buckets' norms go as their reductions are launched, if those are the first pass's.

        A single pass that is the whole update has nothing to be compared with.
        """
        machinery = self._machinery
        is_wanted = machinery.estimator and len(self._requests) == 1 and machinery.engine.size > 1
        return machinery.tally.first_pass_norms if is_wanted else None

    def _reduce(self) -> tuple[Header, Tensor]:
        machinery = self._machinery
        gradients, engine = self._gradients, machinery.engine
        machinery.standing.stage = "reduce"
        reach("reduce.start")
        try:
            gradients.flush(engine, self._norms_on_launch())
            packed = machinery.tally.pack(
                failed=self.failure is not None,
                wishes=self._owner.wishes(),
                seen=gradients.seen,
                statistics=machinery.statistics.sums(),
                divisor=self._divisor,
            )
            reach("reduce.header")
            handle = engine.all_reduce(packed)
        except WorldBroken:
            with suppress(WorldBroken):
                gradients.wait()
            raise
        gradients.wait()
        handle.wait()
        return unpack(packed, gradients.norms(), machinery.gradients.num_parameters, divisor=self._divisor)

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
            raise NonFinite(what, self.plan.index, machinery.last_checkpoint())
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
        factor = self._divisor / header.weight
        if machinery.max_grad_norm is not None:
            # As torch.nn.utils.clip_grad_norm_ does, its guard against a norm of 0 included.
            factor *= min(1.0, machinery.max_grad_norm / (header.gradient_norm / header.weight + 1e-6))
        self._gradients.finish(factor, header.seen)
        machinery.optimizer.step(self.plan.values)
        machinery.statistics.commit(statistics)
        if machinery.estimator is not None:
            samples = self.plan.stop - self.plan.start
            machinery.estimator.add(header.noise_sums(self.plan.num_samples * header.weight / samples), samples)

    def _after_break(self) -> bool:
        self.supersede(self._owner.on_broken(self))
        return self.header is not None

    def _break(self, error: WorldBroken) -> None:
        self._awaits_backward = False
        # What the error came from has frames that lead back to this update: its batches would outlive it for long.
        error.__context__ = None
        self.error = error.with_traceback(None)
        self.outcome = Outcome.BROKEN

    @property
    def committed_header(self) -> Header:
        if self.header is None:
            raise MisusedTrainer("an update's loss and gradient norm are known after it has committed")
        return self.header
