"""adaptive: replays the batches that were decided while training, from the measured noise scale."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule.batches import FixedBatch, scaled
from elastic_batch.schedule.given import GivenBatchSettings, Stretch
from elastic_batch.schedule.lengths import Lengths
from elastic_batch.schedule.settings import BatchSize, effective_momentum
from elastic_batch.schedule.values import ScheduleContext

Decision = tuple[Annotated[int, Field(ge=0)], BatchSize]


class AdaptiveSchedule(GivenBatchSettings):
    """Recorded decisions, each a position and the global batch from there on; before the first, the first batch.

    A decision is part of the trajectory: a run that replays it is equal to the one that made it. A schedule with a
    further decision is a new one, `spec.model_copy(update={"decisions": ...})`.
    """

    strategy: Literal["adaptive"] = "adaptive"
    """Batches as they were decided."""
    max_global_batch_size: BatchSize | None = None
    """No decision may be larger; null: a tenth of the training set."""
    decisions: tuple[Decision, ...] = ()
    """Pairs of a position (samples committed) and a global batch."""

    def stretches(self, context: ScheduleContext, lengths: Lengths) -> list[Stretch]:
        cap = self.cap(context, self.global_batch_size)
        before = -1
        for index, (position, batch) in enumerate(self.decisions):
            field = f"schedule.decisions[{index}]"
            self.check_size(batch, context, field)
            if batch > cap:
                rule = f"must not be above the largest batch, {cap}"
                raise InvalidSetting(field, batch, rule, "Raise max_global_batch_size")
            if position <= before:
                raise InvalidSetting(field, position, f"must be later than the decision before it, at {before}")
            before = position
        made = [(0, self.global_batch_size), *(one for one in self.decisions if one[0] < lengths.end)]
        bounds = [*(position for position, _ in made), lengths.end]
        rate, momentum = context.learning_rate, effective_momentum(context)
        return [
            Stretch(
                start,
                stop,
                FixedBatch(batch),
                scaled(rate, self.global_batch_size, batch, self.learning_rate_scaling),
                momentum,
            )
            for (start, stop), (_, batch) in zip(pairwise(bounds), made, strict=True)
            if start < stop
        ]

    def name_batches(self) -> str:
        return f"adaptive, {len(self.decisions)} recorded decisions"
