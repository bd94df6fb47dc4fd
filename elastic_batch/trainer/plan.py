"""What an update consists of, before anybody runs it: a pure function of the schedule and the position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from elastic_batch.data import PassRequest
from elastic_batch.schedule import PhaseValues, Schedule
from elastic_batch.shares import share


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePlan:
    """The samples and settings of one update.

    Args:
        index: Number of updates before this one.
        start: Position of its first sample.
        stop: Position after its last sample; `stop - start` is a whole number of micro-batches.
        values: The schedule at `start`.
        micro_batch_size: Samples of a micro-batch.
        num_samples: Samples of the training set, N.
    """

    index: int
    start: int
    stop: int
    values: PhaseValues
    micro_batch_size: int
    num_samples: int

    @property
    def num_micro_batches(self) -> int:
        return (self.stop - self.start) // self.micro_batch_size

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the update's first sample; where the update ends an epoch, the one that it ends."""
        return self.start // self.num_samples

    @property
    def ends_epoch(self) -> bool:
        """Whether the last sample of an epoch is in this update."""
        return self.stop // self.num_samples > self.start // self.num_samples

    def passes(self, *, rank: int, size: int, width: int) -> list[PassRequest]:
        """What the worker `rank` of `size` runs, in order: passes of `width` micro-batches, then single ones.

        Only two widths occur, so that a compiled model has two shapes.

        >>> values = PhaseValues(phase=0, global_batch_size=12, learning_rate=0.1, momentum=0.9, until=100)
        >>> plan = UpdatePlan(index=0, start=24, stop=36, values=values, micro_batch_size=4, num_samples=50)
        >>> plan.passes(rank=0, size=1, width=2)
        [PassRequest(start=24, num_micro_batches=2), PassRequest(start=32, num_micro_batches=1)]
        >>> plan.passes(rank=1, size=2, width=2)
        [PassRequest(start=32, num_micro_batches=1)]
        """
        mine = share(self.num_micro_batches, size, rank)
        num_wide = len(mine) // width
        widths = [width] * num_wide + [1] * (len(mine) - num_wide * width)
        starts = accumulate(widths, initial=mine.start)
        return [
            PassRequest(start=self.start + first * self.micro_batch_size, num_micro_batches=count)
            for first, count in zip(starts, widths, strict=False)
        ]


def plan_update(schedule: Schedule, index: int, start: int, known: PhaseValues | None = None) -> UpdatePlan:
    """The update that begins at position `start`; the job's last one has the samples that remain.

    Args:
        schedule: The job's.
        index: Number of updates before this one.
        start: Position of its first sample.
        known: The values of an earlier update; while they hold, the schedule is not asked.
    """
    values = known if known is not None and start < known.until else schedule.at(start)
    return UpdatePlan(
        index=index,
        start=start,
        stop=min(start + values.global_batch_size, schedule.end),
        values=values,
        micro_batch_size=schedule.micro_batch_size,
        num_samples=schedule.num_samples,
    )


def forecast(schedule: Schedule, start: int, *, rank: int, size: int, width: int) -> Iterator[PassRequest]:
    """Every pass of one worker from position `start` to the job's end, should the world stay as it is."""
    values: PhaseValues | None = None
    while start < schedule.end:
        plan = plan_update(schedule, 0, start, values)
        yield from plan.passes(rank=rank, size=size, width=width)
        start, values = plan.stop, plan.values
