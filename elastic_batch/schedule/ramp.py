"""ramp: the batch follows straight lines between points, rounded down to whole micro-batches."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule.batches import FixedBatch, LinearBatch, scaled
from elastic_batch.schedule.durations import Duration
from elastic_batch.schedule.given import PointsSettings, Stretch, read_points
from elastic_batch.schedule.lengths import Lengths
from elastic_batch.schedule.settings import BatchSize, Settings, effective_momentum
from elastic_batch.schedule.values import ScheduleContext


class Point(Settings):
    """A corner of the ramp."""

    at: Duration
    """When."""
    global_batch_size: BatchSize
    """Samples of one update then."""


class RampSchedule(PointsSettings):
    """A batch that grows (or shrinks) evenly from point to point and stays after the last."""

    strategy: Literal["ramp"] = "ramp"
    """Batches along straight lines."""
    points: Annotated[
        tuple[Point, ...],
        Field(min_length=1),
        BeforeValidator(read_points, json_schema_input_type=str | tuple[Point, ...]),
    ]
    """"4e9tok:32 12e9tok:1536", or a list of {at, global_batch_size}. The first line begins at 0, at the first."""

    def stretches(self, context: ScheduleContext, lengths: Lengths) -> list[Stretch]:
        corners = self._corners(context, lengths)
        rate, momentum = context.learning_rate, effective_momentum(context)
        found = []
        for (start, first), (stop, last) in pairwise(corners):
            line = LinearBatch(
                start=start,
                stop=stop,
                first=first,
                last=last,
                micro_batch_size=context.micro_batch_size,
                base=self.global_batch_size,
                scaling=self.learning_rate_scaling,
            )
            found.append(Stretch(start, min(stop, lengths.end), line, rate, momentum))
        start, batch = corners[-1]
        if start < lengths.end:
            final_rate = scaled(rate, self.global_batch_size, batch, self.learning_rate_scaling)
            found.append(Stretch(start, lengths.end, FixedBatch(batch), final_rate, momentum))
        return found

    def _corners(self, context: ScheduleContext, lengths: Lengths) -> list[tuple[int, int]]:
        corners = [(0, self.global_batch_size)]
        for index, point in enumerate(self.points):
            field = f"schedule.points[{index}]"
            self.check_size(point.global_batch_size, context, f"{field}.global_batch_size")
            position = lengths.samples(point.at, field)
            if position > lengths.total:
                rule = f"is past the end: must not be after max_duration, {self.max_duration}"
                raise InvalidSetting(field, str(point.at), rule, "Train longer, or give points as parts ('0.5dur')")
            if position == 0 and index == 0:
                continue
            if position <= corners[-1][0]:
                raise InvalidSetting(field, str(point.at), "must be later than the point before it", "Sort the points")
            corners.append((position, point.global_batch_size))
        return corners

    def name_batches(self) -> str:
        points = " ".join(f"{point.at}:{point.global_batch_size}" for point in self.points)
        return f"ramp from {self.global_batch_size} by {points}"
