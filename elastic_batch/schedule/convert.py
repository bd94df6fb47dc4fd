"""convert: any learning-rate schedule becomes a schedule of batches with the same noise scale."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pydantic import Field

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.noise import NoiseForm
from elastic_batch.schedule.batches import ConvertedBatch, Rule, Trade
from elastic_batch.schedule.curves import Span, ends_of
from elastic_batch.schedule.durations import Duration
from elastic_batch.schedule.lengths import Lengths
from elastic_batch.schedule.resolved import Phase, Schedule
from elastic_batch.schedule.shapes import AnyShape, ConstantShape, Frame
from elastic_batch.schedule.tables import table_spans
from elastic_batch.schedule.trading import Origin, TradeSettings
from elastic_batch.schedule.values import ScheduleContext

Per = Literal["epoch", "update"]


class ConversionSettings(TradeSettings):
    """How a learning-rate schedule, wherever it comes from, is converted.

    Up to the learning rate's maximum the batch stays at its first size and the rate is as given. After it the batch is
    the largest allowed one whose noise scale is not below the given schedule's, and the exact remainder divides the
    rate: it never exceeds its peak.
    """

    growth_only: bool = False
    """Never shrink the batch: where the given rate falls and comes back, the dip stays in the learning rate."""

    def convert(
        self, context: ScheduleContext, source: str, spans: Callable[[Lengths, Origin], list[Span]]
    ) -> Schedule:
        """Convert curves.

        Args:
            context: Training set and optimizer.
            source: Where the curves come from, in words.
            spans: Gives them, once lengths and the initial learning rate are known.

        Raises:
            InvalidSetting: A setting does not fit.
        """
        self.check_batches(context)
        self.check_optimizer(context)
        lengths, origin = Lengths.of(self.max_duration, context), self.origin(context)
        cap = self.cap(context, origin.global_batch_size)
        trade = self.trade(context, origin.global_batch_size, cap)
        return Schedule(
            num_samples=context.num_samples,
            micro_batch_size=context.micro_batch_size,
            end=lengths.end,
            base_learning_rate=context.learning_rate,
            global_batch_size=origin.global_batch_size,
            baseline_batch_size=self.global_batch_size,
            max_global_batch_size=cap,
            noise_form=self.noise_form,
            rule=self._words(source, cap),
            phases=_convert(spans(lengths, origin), trade, origin.momentum, self.growth_only),
        )

    def _words(self, source: str, cap: int) -> str:
        rule = "square-root rule" if self.rule == "sqrt" else f"{self.noise_form} noise scale"
        return f"convert {source}, {rule}, cap {cap}{', growth only' if self.growth_only else ''}"


class ConvertSchedule(ConversionSettings):
    """A named shape of the learning rate, turned into batches."""

    strategy: Literal["convert"] = "convert"
    """The noise scale of a learning-rate schedule, by batches."""
    shape: AnyShape = Field(default_factory=ConstantShape)
    """The learning-rate schedule: a name, or a name with settings."""

    def build(self, context: ScheduleContext) -> Schedule:
        """Resolve the schedule.

        Raises:
            InvalidSetting: A setting does not fit the training set, the micro-batch or the optimizer.
        """

        def spans(lengths: Lengths, origin: Origin) -> list[Span]:
            rate = float(origin.learning_rate)
            warmup = self.warmup_spans(lengths, rate)
            return warmup + self.shape.spans(Frame(warmup[-1].stop if warmup else 0, lengths, rate))

        return self.convert(context, self.shape.name, spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSchedule:
    """A learning rate that is computed step by step, turned into batches.

    Args:
        rates: Called with a context and the number of steps that the job has; gives the learning rate of each.
        per: What a step is: an epoch, or an update of the first batch's size.
        settings: How to convert.
        source: Where the rates come from, in words.
    """

    rates: Callable[[ScheduleContext, int], array[float]]
    per: Per
    settings: ConversionSettings
    source: str

    def __post_init__(self) -> None:
        if self.per not in ("epoch", "update"):
            raise UnknownName("per", self.per, ("epoch", "update"))
        for field in ("warmup", "raised"):
            if getattr(self.settings, field) is not None:
                raise InvalidSetting(field, "given", "cannot be combined with computed rates", "Put it into the rates")

    def build(self, context: ScheduleContext) -> Schedule:
        """Resolve the schedule.

        Raises:
            InvalidSetting: A setting does not fit the training set, the micro-batch or the optimizer.
        """

        def spans(lengths: Lengths, origin: Origin) -> list[Span]:
            step = context.num_samples if self.per == "epoch" else self.settings.global_batch_size
            rates = self.rates(context, -(-lengths.total // step))
            return table_spans(rates, 0, lengths.end, Fraction(step))

        return self.settings.convert(context, f"{self.source} per {self.per}", spans)


def from_function(
    function: Callable[[int], float],
    *,
    per: Per,
    max_duration: str | Duration,
    global_batch_size: int,
    max_global_batch_size: int | None = None,
    growth_only: bool = False,
    rule: Rule = "linear",
    noise_form: NoiseForm = "linear",
) -> TableSchedule:
    """Convert a learning rate given as a function, as `LambdaLR` takes it.

    Args:
        function: From the number of the epoch, or of the update of the first batch's size, to a factor of the rate.
        per: What the function counts, "epoch" or "update".
        max_duration: Length of the job, say "200ep".
        global_batch_size: Samples of one update for which the rates are meant, and with which training begins.
        max_global_batch_size: The batch grows up to here; None: a tenth of the training set.
        growth_only: Never shrink the batch: where the rate falls and comes back, the dip stays in it.
        rule: "linear" (Smith et al., 2018), or for Adam and AdamW "sqrt" (Seesaw, Malladi et al.).
        noise_form: Form of the noise scale that is kept, "linear" or "exact".

    Raises:
        InvalidSetting: An argument is wrong.
    """

    def rates(context: ScheduleContext, num_steps: int) -> array[float]:
        return array("d", (function(step) * context.learning_rate for step in range(num_steps)))

    settings = ConversionSettings.of(
        global_batch_size=global_batch_size,
        max_duration=max_duration,
        max_global_batch_size=max_global_batch_size,
        growth_only=growth_only,
        rule=rule,
        noise_form=noise_form,
    )
    return TableSchedule(rates=rates, per=per, settings=settings, source="a function")


def _convert(spans: list[Span], trade: Trade, momentum: float, growth_only: bool) -> tuple[Phase, ...]:
    ends = ends_of(spans)
    highest = [max(pair) for pair in ends]
    peak = max(highest)
    first_of_peak = highest.index(peak)
    rising = ends[first_of_peak][0] < peak
    peak_position = spans[first_of_peak].stop - 1 if rising else spans[first_of_peak].start
    phases: list[Phase] = []
    floor = 0.0
    for span, (first, last) in zip(reversed(spans), reversed(ends), strict=True):
        # To what the rate still comes back from here on. In a rising span that is at least its own end.
        own = last if last > first else 0.0
        batch = ConvertedBatch(trade, peak, peak_position, max(floor, own) if growth_only else 0.0)
        phases.append(Phase(span.start, span.stop, span.curve, batch, momentum))
        floor = max(floor, first, last)
    return tuple(reversed(phases))
