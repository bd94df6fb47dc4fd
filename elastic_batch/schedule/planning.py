"""What a schedule costs: its phases, updates and idle workers, before anything is paid for."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_batch.errors import InvalidSetting
from elastic_batch.noise import NoiseForm
from elastic_batch.schedule.resolved import Schedule
from elastic_batch.schedule.values import PhaseValues


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """Updates that follow each other in one phase with one global batch."""

    phase: int
    """Index of the phase, from 0."""
    start_epoch: float
    """Where the rule begins to hold; it takes effect with the first update that begins there or later."""
    end_epoch: float
    """Where the next row begins, or the job's end."""
    global_batch_size: int
    num_micro_batches: int
    """Micro-batches of one update."""
    learning_rate: float
    """Of the first update."""
    last_learning_rate: float
    """Of the last update; what is between is between the two."""
    momentum: float
    noise_scale: float
    """Of the first update, in the schedule's form."""
    last_noise_scale: float
    """Of the last update."""
    updates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShare:
    """How a number of workers shares the updates of one row."""

    num_workers: int
    num_micro_batches: int
    """Micro-batches that the busiest worker computes in one update: how long the update takes."""
    idle_share: float
    """Part of the workers' time in which they wait, 1 - M / (R ceil(M / R)) for M micro-batches on R workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A schedule in rows and totals."""

    rule: str
    """What the schedule does, in words."""
    noise_form: NoiseForm
    updates: int
    samples: int
    """The job's length, rounded up to whole micro-batches."""
    epochs: float
    baseline_updates: int
    """Updates of the same job with plain decay, at the first batch throughout, nothing raised."""
    rows: tuple[PlanRow, ...]

    def shares(self, num_workers: int) -> list[WorkerShare]:
        """Give for each row how many workers share its updates.

        Raises:
            InvalidSetting: There is not at least one worker.
        """
        return [worker_share(row.num_micro_batches, num_workers) for row in self.rows]

    def micro_batches_in_sequence(self, num_workers: int) -> int:
        """Count the micro-batches that have to be computed one after the other; the time is proportional to it.

        Raises:
            InvalidSetting: There is not at least one worker.
        """
        shares = self.shares(num_workers)
        return sum(row.updates * share.num_micro_batches for row, share in zip(self.rows, shares, strict=True))


def worker_share(num_micro_batches: int, num_workers: int) -> WorkerShare:
    """Share one update of `num_micro_batches` among `num_workers`.

    Raises:
        InvalidSetting: There is not at least one worker.

    >>> worker_share(8, 3)
    WorkerShare(num_workers=3, num_micro_batches=3, idle_share=0.11111111111111116)
    """
    if num_workers < 1:
        raise InvalidSetting("workers", num_workers, "must be at least 1")
    largest = -(-num_micro_batches // num_workers)
    idle = 1 - num_micro_batches / (num_workers * largest)
    return WorkerShare(num_workers=num_workers, num_micro_batches=largest, idle_share=idle)


def plan(schedule: Schedule) -> Plan:
    """Count a schedule's updates and describe its phases, one row for each change of the global batch.

    The work grows with the number of rows, not with the number of updates.
    """
    rows: list[PlanRow] = []
    position, begin = 0, 0
    while position < schedule.end:
        values = schedule.at(position)
        updates = schedule.updates_of_equal_batch(position)
        last = position + (updates - 1) * values.global_batch_size
        position = stop = min(last + values.global_batch_size, schedule.end)
        if position < schedule.end and (following := schedule.at(position).phase) != values.phase:
            stop = schedule.phases[following].start  # where the rule changes, not where the last update happens to end
        rows.append(_row(schedule, values, schedule.at(last), (begin, stop), updates))
        begin = stop
    return Plan(
        rule=schedule.rule,
        noise_form=schedule.noise_form,
        updates=sum(row.updates for row in rows),
        samples=schedule.end,
        epochs=schedule.end / schedule.num_samples,
        baseline_updates=-(-schedule.end // schedule.baseline_batch_size),
        rows=tuple(rows),
    )


def _row(schedule: Schedule, first: PhaseValues, last: PhaseValues, bounds: tuple[int, int], updates: int) -> PlanRow:
    return PlanRow(
        phase=first.phase,
        start_epoch=bounds[0] / schedule.num_samples,
        end_epoch=bounds[1] / schedule.num_samples,
        global_batch_size=first.global_batch_size,
        num_micro_batches=first.global_batch_size // schedule.micro_batch_size,
        learning_rate=first.learning_rate,
        last_learning_rate=last.learning_rate,
        momentum=first.momentum,
        noise_scale=schedule.noise_scale(first),
        last_noise_scale=schedule.noise_scale(last),
        updates=updates,
    )
