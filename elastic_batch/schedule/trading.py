"""Settings of the strategies that trade learning rate for batch, and the point from which they start."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from pydantic import model_validator

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule.batches import Rule, Trade
from elastic_batch.schedule.settings import (
    LearningRate,
    Momentum,
    ScheduleSettings,
    Settings,
    effective_momentum,
)
from elastic_batch.schedule.values import ScheduleContext


class Raised(Settings):
    """A higher learning rate or momentum from the start, and as much more batch (Smith et al., 2018, section 5.2)."""

    learning_rate: LearningRate | None = None
    """Instead of the optimizer's."""
    momentum: Momentum | None = None
    """Instead of the optimizer's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.learning_rate is None and self.momentum is None:
            raise InvalidSetting("learning_rate", None, "raised needs a learning_rate, a momentum or both")
        return self


@dataclass(frozen=True, slots=True)
class Origin:
    """First batch, learning rate and momentum after anything was raised."""

    global_batch_size: int
    learning_rate: Fraction
    momentum: float


class TradeSettings(ScheduleSettings):
    """Fields of the strategies in which the batch grows where the learning rate would fall."""

    rule: Rule = "linear"
    """What a larger batch is worth: linear (the paper: B grows by what lr would fall) or sqrt (Adam only: lr falls by
    the square root of that as well)."""
    raised: Raised | None = None
    """Raise the learning rate or the momentum from the start; the first batch grows as lr / (1 - m)."""

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        if self.rule == "sqrt" and self.noise_form == "exact":
            raise InvalidSetting("noise_form", "exact", "the sqrt rule does not keep the noise scale", "Use linear")
        if self.rule == "sqrt" and self.raised is not None:
            raise InvalidSetting("raised", "given", "only the linear rule has it", "Set the initial values directly")
        return self

    def check_optimizer(self, context: ScheduleContext) -> None:
        """See that rule and raised settings suit the optimizer.

        Raises:
            InvalidSetting: One does not.
        """
        if self.rule == "sqrt" and not context.adaptive_optimizer:
            rule = "must be linear, because SGD's noise scale is lr N / (B (1 - m))"
            raise InvalidSetting("schedule.rule", "sqrt", rule, "sqrt is for Adam and AdamW")
        if self.raised and self.raised.momentum is not None and context.adaptive_optimizer:
            field, value = "schedule.raised.momentum", self.raised.momentum
            raise InvalidSetting(field, value, "only SGD has a momentum", "Raise the learning rate alone")

    def trade(self, context: ScheduleContext, first: int, cap: int) -> Trade:
        """Give the exchange rate between batch and learning rate from a first batch on."""
        return Trade(
            num_samples=context.num_samples,
            micro_batch_size=context.micro_batch_size,
            first=first,
            cap=cap,
            noise_form=self.noise_form,
            rule=self.rule,
        )

    def origin(self, context: ScheduleContext) -> Origin:
        """Give first batch, learning rate and momentum; raised ones keep the noise scale: B ~ lr / (1 - m).

        Raises:
            InvalidSetting: They are not raised, or ask for a batch above the cap.
        """
        momentum, rate = effective_momentum(context), Fraction(str(context.learning_rate))
        if self.raised is None:
            return Origin(self.global_batch_size, rate, momentum)
        new_momentum = momentum if self.raised.momentum is None else self.raised.momentum
        new_rate = rate if self.raised.learning_rate is None else Fraction(str(self.raised.learning_rate))
        kept = (1 - Fraction(str(new_momentum))) / (1 - Fraction(str(momentum)))
        growth = new_rate / rate / kept
        if growth < 1:
            rule = f"must raise lr / (1 - m), which is {float(1 / growth):g} times as large in the optimizer"
            raise InvalidSetting("schedule.raised", self.raised.model_dump(exclude_none=True), rule)
        # Asked without a limit, so that a cap that is too low is an error and not a lower learning rate.
        free = self.trade(context, self.global_batch_size, context.num_samples)
        batch = free.batch(float(growth))
        if batch >= context.num_samples:
            rule = f"must ask for a first batch below the training set's {context.num_samples} samples"
            raise InvalidSetting("schedule.raised", self.raised.model_dump(exclude_none=True), rule, "Raise less")
        if self.max_global_batch_size is not None:
            self.cap(context, batch)
        exact = free.exact_learning_rate(rate * kept, batch)
        return Origin(batch, Fraction(str(exact)), new_momentum)
