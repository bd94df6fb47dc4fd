"""decay-lr, grow-batch, hybrid: at each milestone the noise scale falls by a factor (Smith et al., 2018, section 5)."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import accumulate, pairwise
from operator import mul
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule.batches import FixedBatch
from elastic_batch.schedule.curves import Constant
from elastic_batch.schedule.durations import Duration
from elastic_batch.schedule.lengths import Lengths
from elastic_batch.schedule.resolved import Phase, Schedule
from elastic_batch.schedule.trading import Origin, TradeSettings
from elastic_batch.schedule.values import ScheduleContext


class MilestoneSchedule(TradeSettings):
    """The paper's strategies. They share all fields, so that one job can be run with each of them."""

    strategy: Literal["decay-lr", "grow-batch", "hybrid"]
    """decay-lr: the learning rate is divided; grow-batch: the batch is multiplied up to its cap, and what is left over
    divides the learning rate; hybrid: the batch grows at the first `num_growths` milestones, later the rate decays."""
    milestones: tuple[Duration, ...]
    """When the noise scale falls."""
    factor: float | tuple[float, ...]
    """By how much, one for all milestones or one for each."""
    num_growths: Annotated[int, Field(gt=0)] = 1
    """hybrid: at how many milestones the batch grows."""

    @model_validator(mode="after")
    def _check_factors(self) -> Self:
        if isinstance(self.factor, tuple) and len(self.factor) != len(self.milestones):
            rule = f"must be one number, or one for each of the {len(self.milestones)} milestones"
            raise InvalidSetting("factor", list(self.factor), rule)
        for factor in self._factors:
            if not (factor > 1 and math.isfinite(factor)):
                remedy = "It divides the noise scale: 5 for a learning rate that would be multiplied by 0.2"
                raise InvalidSetting("factor", factor, "must be above 1", remedy)
        return self

    @property
    def _factors(self) -> tuple[float, ...]:
        return self.factor if isinstance(self.factor, tuple) else (self.factor,) * max(1, len(self.milestones))

    def build(self, context: ScheduleContext) -> Schedule:
        """Resolve the schedule.

        Raises:
            InvalidSetting: A setting does not fit the training set, the micro-batch or the optimizer.
        """
        self.check_batches(context)
        self.check_optimizer(context)
        lengths = Lengths.of(self.max_duration, context)
        origin = self.origin(context)
        num_growths = self._growths()
        cap = self.cap(context, origin.global_batch_size) if num_growths else origin.global_batch_size
        phases = self._phases(context, lengths, origin, cap, num_growths)
        return Schedule(
            num_samples=context.num_samples,
            micro_batch_size=context.micro_batch_size,
            end=lengths.end,
            base_learning_rate=context.learning_rate,
            global_batch_size=origin.global_batch_size,
            baseline_batch_size=self.global_batch_size,
            max_global_batch_size=max(phase.batch.allocate(phase.start, 0.0)[0] for phase in phases),
            noise_form=self.noise_form,
            rule=self._words(cap),
            phases=phases,
        )

    def _growths(self) -> int:
        """At how many milestones the batch grows."""
        if self.strategy == "decay-lr":
            return 0
        if self.strategy == "grow-batch":
            return len(self.milestones)
        if self.num_growths > len(self.milestones):
            rule = f"must not be above the number of milestones, {len(self.milestones)}"
            raise InvalidSetting("schedule.num_growths", self.num_growths, rule)
        return self.num_growths

    def _phases(
        self, context: ScheduleContext, lengths: Lengths, origin: Origin, cap: int, num_growths: int
    ) -> tuple[Phase, ...]:
        trade = self.trade(context, origin.global_batch_size, cap)
        warmup = self.warmup_spans(lengths, float(origin.learning_rate))
        phases = [
            Phase(span.start, span.stop, span.curve, FixedBatch(origin.global_batch_size), origin.momentum)
            for span in warmup
        ]
        start = warmup[-1].stop if warmup else 0
        bounds = [start, *lengths.milestones(self.milestones, "schedule.milestones", after=start), lengths.end]
        factors = [Fraction(str(factor)) for factor in self._factors[: len(self.milestones)]]
        drops = list(accumulate(factors, mul, initial=Fraction(1)))
        for index, ((begin, end), drop) in enumerate(zip(pairwise(bounds), drops, strict=True)):
            batch = trade.batch(float(drops[min(index, num_growths)]))
            rate = trade.exact_learning_rate(origin.learning_rate / drop, batch)
            # min: a wanted batch just below a grid value counts as it, which may cost a rounding error of rate.
            constant = Constant(min(rate, float(origin.learning_rate)))
            phases.append(Phase(begin, end, constant, FixedBatch(batch), origin.momentum))
        return tuple(phases)

    def _words(self, cap: int) -> str:
        factors = self.factor if isinstance(self.factor, tuple) else (self.factor,)
        words = [self.strategy, f"factor {'/'.join(f'{factor:g}' for factor in factors)}"]
        if self.strategy == "hybrid":
            words.append(f"the batch grows at {self.num_growths} of {len(self.milestones)} milestones")
        words.append("square-root rule" if self.rule == "sqrt" else f"{self.noise_form} noise scale")
        return ", ".join(words if self.strategy == "decay-lr" else [*words, f"cap {cap}"])
