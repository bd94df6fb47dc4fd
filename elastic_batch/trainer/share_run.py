"""One worker's share of an update: pass after pass is fetched, run and added to the sums, until one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from numbers import Real
from typing import Any

from torch import Tensor

from elastic_batch.data import PassRequest
from elastic_batch.errors import MisusedTrainer, WorldBroken
from elastic_batch.failpoints import reach
from elastic_batch.stream import micro_batch_seed
from elastic_batch.trainer.failures import Failure, Severity, is_out_of_memory, judge
from elastic_batch.trainer.machinery import Machinery
from elastic_batch.trainer.plan import UpdatePlan
from elastic_batch.trainer.stochastic import PassDraws

_STRAYED = "for the first time somebody drew from Python's or numpy's random generator; each pass seeds them now"


class ShareRun:
    """Runs one worker's passes of an update, once.

    Args:
        plan: The update's.
        requests: This worker's passes.
        machinery: What it works with; its tally and statistics begin anew.

    Attributes:
        gradients: The update's sums.
        divisor: What loss sums are divided by before their backward.
        failure: Why this worker gave its share up; None if it did not.
        error: What `failure` came from.
        is_over: Whether nothing can be added any more: it failed, or its world is gone.
        is_cut_off: Whether the world broke under it.
    """

    def __init__(self, plan: UpdatePlan, requests: list[PassRequest], machinery: Machinery) -> None:
        self.divisor = machinery.scaler.divisor(plan.stop - plan.start)
        self.failure: Failure | None = None
        self.error: Exception | None = None
        self.is_over = self.is_cut_off = False
        self._micro_batch_size = plan.micro_batch_size
        self._requests = requests
        self._machinery = machinery
        self._num_done = 0
        self._is_iterated = False
        self._awaits_backward = False
        self._draws: PassDraws | None = None
        self.gradients = machinery.gradients.begin(alone=machinery.engine.size == 1)
        machinery.tally.begin()
        machinery.statistics.begin()

    @property
    def has_run_all(self) -> bool:
        """Whether the last pass has been run: its backward begins the reductions."""
        return 0 < len(self._requests) == self._num_done

    def batches(self) -> Iterator[Any]:
        """Each pass's batch, on the device, under the random seeds of its position; `backward` answers it."""
        machinery = self._machinery
        if self._is_iterated:
            self.fail(MisusedTrainer("an update's batches are there once; loop over it once, and keep what is needed"))
        self._is_iterated = True
        if self.is_over:
            return
        with machinery.seeds:
            for request, seeds in zip(self._requests, self._seeds(), strict=True):
                batch = self._fetch()
                if self.is_over:
                    return
                yield from self._compare(batch, seeds)
                if self.is_over:
                    return
                machinery.statistics.samples_per_pass = self._num_samples(request)
                self._awaits_backward = True
                with self._forward(seeds):
                    try:
                        yield batch
                    except GeneratorExit:  # whoever left the loop is not to answer the batch outside it
                        self._awaits_backward = False
                        raise
                if self._awaits_backward and not self.is_over:
                    self._check(self.gradients.check)  # it may have been loss.backward()
                if self._awaits_backward and not self.is_over:
                    self.fail(MisusedTrainer("a batch got no update.backward(loss); call it once for each batch"))
                if self.is_over:
                    return

    def backward(self, loss: Tensor, weight: Tensor | float | None) -> None:
        """Add the gradient of one batch: see `Update.backward`."""
        _require_number("loss", loss, "one number: a mean over the batch's samples, or a sum with weight=...")
        if weight is not None:
            _require_number("weight", weight, "one number: what the sum of losses is to be divided by")
        if self._machinery.first_batches.is_comparing:
            self._machinery.first_batches.record(loss, weight, None if self._draws is None else self._draws.stray())
            return
        if self.is_cut_off:
            return
        if not self._awaits_backward:
            raise MisusedTrainer("update.backward(loss) belongs inside the loop over the update, once for each batch")
        self._awaits_backward = False
        if self._draws is not None and (reason := self._draws.stray()):
            self._narrow(reason)
            return
        count = self._num_samples(self._requests[self._num_done]) if weight is None else 1
        try:
            self._accumulate(loss, count, count if weight is None else weight)
        except WorldBroken:
            self.cut_off()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.fail(error)
        else:
            if self._draws is not None and not self._draws.is_untouched():
                self._narrow("the backward pass drew random numbers")

    def finish(self) -> None:
        """The user is done: see that every batch was run, and that nobody else changed a gradient or steers."""
        self._machinery.statistics.samples_per_pass = None  # what else the model is given is not of the share
        if not self.is_over and self._num_done < len(self._requests):
            self.fail(MisusedTrainer("update.step() was called before every batch of the update was run"))
        if not self.is_over:
            self._check(self.gradients.check)
        if not self.is_over:
            self._check(self._machinery.optimizer.check)
        if not self.is_over and self._machinery.seeds.have_strayed():
            self._end(Failure(Severity.SEEDED, _STRAYED))

    def flush(self) -> None:
        """Launch the reductions that no backward launched."""
        self.gradients.flush(self._machinery.engine, self._norms_on_launch())

    def fail(self, error: Exception) -> None:
        """Give this worker's share up: all workers will hear of it in the header and repeat the update."""
        width = self._requests[self._num_done].num_micro_batches if self._num_done < len(self._requests) else 1
        self.error = error
        self._end(judge(error, width))

    def cut_off(self) -> None:
        """The world broke: what this worker has of the update belongs to none."""
        self._awaits_backward = False
        self.is_over = self.is_cut_off = True

    def _narrow(self, reason: str) -> None:
        self._end(Failure(Severity.NARROWER, f"passes have one micro-batch from here on: {reason}"))

    def _end(self, failure: Failure) -> None:
        self._awaits_backward = False
        self.failure = failure
        self.is_over = True

    def _seeds(self) -> list[list[int]]:
        """For each pass, the seeds of its micro-batches: all at once, since the second takes a fraction of the first's
        time."""
        seed, size = self._machinery.seed, self._micro_batch_size
        return [
            [
                micro_batch_seed(seed, position, "forward")
                for position in range(request.start, request.start + self._num_samples(request), size)
            ]
            for request in self._requests
        ]

    def _check(self, check: Callable[[], None]) -> None:
        try:
            check()
        except MisusedTrainer as error:
            self.fail(error)

    def _num_samples(self, request: PassRequest) -> int:
        return request.num_micro_batches * self._micro_batch_size

    def _fetch(self) -> Any:
        try:
            batch = self._machinery.source.next()
            self._machinery.engine.check()
            return batch
        except WorldBroken:
            self.cut_off()
            return None
        except Exception as error:  # of users' own batches and transforms as well: the others must hear of it
            self.fail(error)
            return None

    def _forward(self, seeds: list[int]) -> AbstractContextManager[Any]:
        """What the user's turn runs in: each of the pass's micro-batches draws what belongs to its position, if any."""
        if len(seeds) > 1:
            return self._forward_of_many(seeds)
        if seeds:
            self._machinery.seeds.seed(seeds[0])
        return self._machinery.autocast.forward()

    @contextmanager
    def _forward_of_many(self, seeds: list[int]) -> Iterator[None]:
        machinery = self._machinery
        with machinery.randomness.over(seeds, machinery.device) as self._draws, machinery.autocast.forward():
            yield
        self._draws = None

    def _compare(self, batch: Any, seeds: list[int]) -> Iterator[Any]:
        """What comes before a batch that is a first one of its kind, answered by `backward` as well."""
        first = self._machinery.first_batches
        try:
            with closing(first.parts(batch, seeds, self._micro_batch_size)) as parts:
                for part, its_seeds in parts:
                    with self._forward(its_seeds):
                        yield part
                    if self.is_over:
                        return
        except MisusedTrainer as error:
            self.fail(error)
            return
        if first.obstacle is not None:
            self._narrow(first.obstacle)

    def _accumulate(self, loss: Tensor, count: int, weight: Tensor | float) -> None:
        machinery = self._machinery
        reach("compute.pass")
        is_first, is_last = self._num_done == 0, self._num_done + 1 == len(self._requests)
        machinery.tally.add(loss, count, weight)
        engine, norms = (machinery.engine, self._norms_on_launch()) if is_last else (None, None)
        with self.gradients.accepting(engine, norms):
            # It begins with the factor instead of 1: that is cheaper than multiplying the loss. A new tensor each time,
            # because what is a view of the loss gets one of this for its gradient, and sums are changed in place.
            machinery.autocast.backward(loss, loss.new_full((), count / self.divisor))
        if is_first and not is_last and machinery.estimator:
            machinery.tally.first_pass_norms = self.gradients.norms()
        self._num_done += 1

    def _norms_on_launch(self) -> list[Tensor] | None:
        """Where the buckets' norms go as their reductions are launched, if those are the first pass's.

        A single pass that is the whole update has nothing to be compared with.
        """
        machinery = self._machinery
        is_wanted = machinery.estimator and len(self._requests) == 1 and machinery.engine.size > 1
        return machinery.tally.first_pass_norms if is_wanted else None


def _require_number(name: str, value: object, what: str) -> None:
    if isinstance(value, Tensor):
        if value.dim() == 0 and not value.is_complex():
            return
        found = f"has shape {tuple(value.shape)}" if value.dim() else "is complex"
    elif name == "weight" and isinstance(value, Real):
        return
    else:
        found = f"is a {type(value).__name__}" if value is not None else "is None"
    raise MisusedTrainer(f"the {name} {found}; it must be {what}")
