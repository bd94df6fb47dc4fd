"""steps: a list of points at which the batch, and if asked the learning rate or the momentum, changes."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule.batches import FixedBatch, scaled
from elastic_batch.schedule.durations import Duration
from elastic_batch.schedule.given import PointsSettings, Stretch, read_points
from elastic_batch.schedule.lengths import Lengths
from elastic_batch.schedule.settings import BatchSize, LearningRate, Momentum, Settings, effective_momentum
from elastic_batch.schedule.values import ScheduleContext


class Step(Settings):
    """A change at one point of the training; what is left out stays as it was."""

    at: Duration
    """When."""
    global_batch_size: BatchSize | None = None
    """Samples of one update from here on."""
    learning_rate: LearningRate | None = None
    """The full learning rate, of which shape and warm-up are parts, from here on."""
    momentum: Momentum | None = None
    """SGD's momentum from here on."""


class StepsSchedule(PointsSettings):
    """A list of batches, each from a point on, as large language models are trained with."""

    strategy: Literal["steps"] = "steps"
    """Batches from a list."""
    points: Annotated[
        tuple[Step, ...],
        Field(min_length=1),
        BeforeValidator(read_points, json_schema_input_type=str | tuple[Step, ...]),
    ]
    """"0:768 250e9tok:1536", or a list of {at, global_batch_size, learning_rate, momentum}."""

    def stretches(self, context: ScheduleContext, lengths: Lengths) -> list[Stretch]:
        num_at_zero = int(self.points[0].at.amount == 0)
        later = tuple(step.at for step in self.points[num_at_zero:])
        bounds = [0, *lengths.milestones(later, "schedule.points", first_index=num_at_zero), lengths.end]
        states = self._states(context)
        return [
            Stretch(start, stop, FixedBatch(batch), rate, momentum)
            for (start, stop), (batch, rate, momentum) in zip(pairwise(bounds), states, strict=True)
        ]

    def _states(self, context: ScheduleContext) -> list[tuple[int, float, float]]:
        """Batch, full learning rate and momentum, first those at 0 and then one more for each later step."""
        batch, momentum, own_rate = self.global_batch_size, effective_momentum(context), context.learning_rate
        states = [(batch, own_rate, momentum)]
        for index, step in enumerate(self.points):
            self._check_step(step, context, f"schedule.points[{index}]")
            batch = step.global_batch_size or batch
            own_rate = step.learning_rate or own_rate
            momentum = momentum if step.momentum is None else step.momentum
            rate = scaled(own_rate, self.global_batch_size, batch, self.learning_rate_scaling)
            states.append((batch, rate, momentum))
        return states[1:] if self.points[0].at.amount == 0 else states

    def _check_step(self, step: Step, context: ScheduleContext, field: str) -> None:
        if step.global_batch_size is not None:
            self.check_size(step.global_batch_size, context, f"{field}.global_batch_size")
        if step.learning_rate is not None and self.learning_rate_scaling != "none":
            rule = f"cannot be combined with learning_rate_scaling = {self.learning_rate_scaling!r}"
            raise InvalidSetting(f"{field}.learning_rate", step.learning_rate, rule, "Use one of the two")
        if step.momentum is not None and context.adaptive_optimizer:
            raise InvalidSetting(f"{field}.momentum", step.momentum, "only SGD has a momentum", "Remove it")

    def name_batches(self) -> str:
        entries = " ".join(f"{step.at}:{step.global_batch_size}" for step in self.points if step.global_batch_size)
        return f"steps {entries or 'of learning rate and momentum'}"
