"""A schedule that is ready to run: position -> (global batch, learning rate, momentum)."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from elastic_batch.noise import NoiseForm, scheduled_noise_scale
from elastic_batch.schedule.batches import Batch
from elastic_batch.schedule.curves import Curve
from elastic_batch.schedule.values import PhaseValues


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch [start, stop) of positions with one rule; within it batch and learning-rate curve never turn."""

    start: int
    stop: int
    curve: Curve
    batch: Batch
    momentum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A job's schedule, resolved for its training set and micro-batch: pure, immutable and picklable.

    Nothing in it knows how many workers there are.

    >>> from elastic_batch.schedule import MilestoneSchedule, ScheduleContext
    >>> spec = MilestoneSchedule(strategy="grow-batch", global_batch_size=128, max_duration="200ep",
    ...                          milestones=("60ep", "120ep", "160ep"), factor=5, max_global_batch_size=5120)
    >>> schedule = spec.build(ScheduleContext(num_samples=50000, micro_batch_size=128, learning_rate=0.1, momentum=0.9))
    >>> for epoch in (0, 60, 120, 160):
    ...     values = schedule.at(epoch * 50000)
    ...     print(values.phase, values.global_batch_size, values.learning_rate)
    0 128 0.1
    1 640 0.1
    2 3200 0.1
    3 5120 0.032
    """

    num_samples: int
    """N, samples of the training set."""
    micro_batch_size: int
    """Samples of one unit of work; every global batch is a multiple of it."""
    end: int
    """The job's length in samples, rounded up to whole micro-batches."""
    base_learning_rate: float
    """The optimizer's; parameter groups keep their ratio to it."""
    global_batch_size: int
    """The batch of the first update."""
    baseline_batch_size: int
    """The first batch before anything was raised: that of plain decay, throughout."""
    max_global_batch_size: int
    """No update is larger."""
    noise_form: NoiseForm
    """With which form of the noise scale the schedule was made."""
    rule: str
    """What the schedule does, in words."""
    phases: tuple[Phase, ...]
    """From 0 to the end, without a gap."""
    _starts: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", [phase.start for phase in self.phases])

    def at(self, position: int) -> PhaseValues:
        """Give what holds for the update whose first sample is at `position`.

        Args:
            position: 0 <= position < end.

        Raises:
            ValueError: The position is outside of the job.
        """
        index, phase = self._phase(position)
        batch, learning_rate = phase.batch.allocate(position, phase.curve.value(position))
        until = min(phase.stop, phase.curve.until(position), phase.batch.until(position))
        return PhaseValues(
            phase=index,
            global_batch_size=batch,
            learning_rate=learning_rate,
            momentum=phase.momentum,
            until=int(until),
        )

    def noise_scale(self, values: PhaseValues) -> float:
        """Compute the scheduled noise scale g of an update, in the schedule's form."""
        return scheduled_noise_scale(
            learning_rate=values.learning_rate,
            momentum=values.momentum,
            num_samples=self.num_samples,
            global_batch_size=values.global_batch_size,
            form=self.noise_form,
        )

    def digest(self, position: int) -> str:
        """Make a short text that is another one wherever anything before a position is; what comes later leaves it.

        Args:
            position: 0 <= position <= end.
        """
        rules = [
            (phase.start, phase.curve.description(phase.start, min(position, phase.stop)), phase.batch, phase.momentum)
            for phase in self.phases
            if phase.start < position
        ]
        return hashlib.sha256(repr(rules).encode()).hexdigest()[:16]

    def updates_of_equal_batch(self, position: int) -> int:
        """Count the updates from `position` on that have the same phase and global batch, in logarithmic time."""
        _, phase = self._phase(position)
        batch = phase.batch.allocate(position, phase.curve.value(position))[0]
        most = -(-(min(phase.stop, self.end) - position) // batch)
        # The batch never turns within a phase: the equal ones come first, and bisection finds the last of them.
        return (
            bisect_right(
                range(1, most),
                False,
                key=lambda n: (
                    phase.batch.allocate(position + n * batch, phase.curve.value(position + n * batch))[0] != batch
                ),
            )
            + 1
        )

    def _phase(self, position: int) -> tuple[int, Phase]:
        if not 0 <= position < self.end:
            raise ValueError(f"position {position} is outside of the job, which has {self.end} samples")
        index = bisect_right(self._starts, position) - 1
        return index, self.phases[index]


class Run(NamedTuple):
    """Updates that follow each other with the same values."""

    position: int
    """Of the first sample."""
    num_updates: int
    values: PhaseValues
    num_samples: int
    """Of all its updates; the job's last update may be shorter than the batch."""


def walk(schedule: Schedule, start: int = 0) -> Iterator[Run]:
    """Walk over a job's updates, those with equal values at once.

    Args:
        schedule: The schedule.
        start: Position of the first update; it must be one at which an update begins.
    """
    position = start
    while position < schedule.end:
        values = schedule.at(position)
        stop = min(values.until, schedule.end)
        num_updates = -(-(stop - position) // values.global_batch_size)
        after = min(position + num_updates * values.global_batch_size, schedule.end)
        yield Run(position, num_updates, values, after - position)
        position = after
