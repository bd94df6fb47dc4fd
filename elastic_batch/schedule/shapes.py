"""Named shapes of a learning rate, as a job file writes them, and their curves."""

from __future__ import annotations

import math
from abc import abstractmethod
from array import array
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule.curves import (
    Constant,
    Cosine,
    Curve,
    Exponential,
    InverseSquareRoot,
    Polynomial,
    Span,
)
from elastic_batch.schedule.durations import Duration
from elastic_batch.schedule.lengths import Lengths
from elastic_batch.schedule.settings import Settings
from elastic_batch.schedule.tables import table_spans

Factor = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Gamma = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_MOST_STEPS = 100_000
"""Each is a phase, held in memory."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a shape lies: from the end of the warm-up to the job's end, at the full learning rate."""

    start: int
    lengths: Lengths
    learning_rate: float

    @property
    def stop(self) -> int:
        """The job's end."""
        return self.lengths.end

    def follow(self, breaks: list[int], curves: list[Curve]) -> list[Span]:
        """Lay curves one after the other, with the given positions between them; drop those past the end."""
        bounds = [self.start, *breaks, self.stop]
        spans = [Span(a, min(b, self.stop), curve) for (a, b), curve in zip(pairwise(bounds), curves, strict=True)]
        return [span for span in spans if span.start < span.stop]


class Shape(Settings):
    """Base of the shapes. A shape begins where the warm-up ends, with the full learning rate."""

    @abstractmethod
    def spans(self, frame: Frame) -> list[Span]:
        """Give the curves from `frame.start` to the job's end.

        Raises:
            InvalidSetting: A duration does not fit into the job.
        """


class ConstantShape(Shape):
    """The learning rate stays."""

    name: Literal["constant"] = "constant"

    def spans(self, frame: Frame) -> list[Span]:
        return frame.follow([], [Constant(frame.learning_rate)])


class MultiStepShape(Shape):
    """Multiplied by gamma at each milestone."""

    name: Literal["multi-step"]
    milestones: tuple[Duration, ...]
    """When, counted from the job's start."""
    gamma: Gamma
    """By how much, 0.2 for a division by 5."""

    def spans(self, frame: Frame) -> list[Span]:
        breaks = frame.lengths.milestones(self.milestones, "schedule.shape.milestones", after=frame.start)
        return frame.follow(breaks, _steps(frame.learning_rate, self.gamma, len(breaks)))


class StepShape(Shape):
    """Multiplied by gamma once per period."""

    name: Literal["step"]
    every: Duration
    """The period."""
    gamma: Gamma
    """By how much, 0.1 for a division by 10."""

    def spans(self, frame: Frame) -> list[Span]:
        period = frame.lengths.period(self.every, "schedule.shape.every")
        count = math.ceil((frame.lengths.total - frame.start) / period) - 1
        if count > _MOST_STEPS:
            rule = f"must not make more than {_MOST_STEPS} steps; these are {count}"
            raise InvalidSetting("schedule.shape.every", str(self.every), rule, "Use exponential, which has no steps")
        breaks = [frame.start + math.ceil(period * k) for k in range(1, count + 1)]
        return frame.follow(breaks, _steps(frame.learning_rate, self.gamma, count))


class ExponentialShape(Shape):
    """Multiplied by gamma per period, evenly in between."""

    name: Literal["exponential"]
    gamma: Gamma
    """Factor per period."""
    every: Duration = Duration(Fraction(1), "ep")
    """The period."""

    def spans(self, frame: Frame) -> list[Span]:
        period = float(frame.lengths.period(self.every, "schedule.shape.every"))
        return frame.follow([], [Exponential(frame.start, frame.learning_rate, self.gamma, period)])


class CosineShape(Shape):
    """Half a cosine wave, down to `final_factor` at the job's end."""

    name: Literal["cosine"]
    final_factor: Factor = 0.0
    """What is left at the end, as a part of the full learning rate."""

    def spans(self, frame: Frame) -> list[Span]:
        last = self.final_factor * frame.learning_rate
        return frame.follow([], [Cosine(frame.start, frame.lengths.total, frame.learning_rate, last)])


class CosineRestartsShape(Shape):
    """Cosine waves that begin anew at the full learning rate."""

    name: Literal["cosine-restarts"]
    period: Duration
    """Length of the first wave."""
    period_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Each wave is this many times as long as the one before."""
    final_factor: Factor = 0.0
    """What is left at the end of a wave, as a part of the full learning rate."""

    def spans(self, frame: Frame) -> list[Span]:
        period = frame.lengths.period(self.period, "schedule.shape.period")
        bounds, length = [Fraction(frame.start)], period
        while bounds[-1] < frame.stop:
            bounds.append(bounds[-1] + length)
            length *= Fraction(str(self.period_factor))
        starts = [math.ceil(bound) for bound in bounds]
        last = self.final_factor * frame.learning_rate
        return frame.follow(starts[1:-1], [Cosine(a, b, frame.learning_rate, last) for a, b in pairwise(starts)])


class LinearShape(Shape):
    """A straight line, down to `final_factor` at the job's end."""

    name: Literal["linear"]
    final_factor: Factor = 0.0
    """What is left at the end, as a part of the full learning rate."""

    def spans(self, frame: Frame) -> list[Span]:
        last = self.final_factor * frame.learning_rate
        return frame.follow([], [Polynomial(frame.start, frame.lengths.total, frame.learning_rate, last)])


class PolynomialShape(Shape):
    """final + (full - final) (1 - x)^power, x the part of the job that is done."""

    name: Literal["polynomial"]
    power: Gamma
    """1 is a straight line; above 1 the learning rate falls faster at first."""
    final_factor: Factor = 0.0
    """What is left at the end, as a part of the full learning rate."""

    def spans(self, frame: Frame) -> list[Span]:
        last = self.final_factor * frame.learning_rate
        return frame.follow([], [Polynomial(frame.start, frame.lengths.total, frame.learning_rate, last, self.power)])


class InverseSquareRootShape(Shape):
    """full / sqrt(1 + t / timescale), t the samples since the warm-up."""

    name: Literal["inverse-sqrt"]
    timescale: Duration
    """After three of it the learning rate is halved."""

    def spans(self, frame: Frame) -> list[Span]:
        timescale = float(frame.lengths.period(self.timescale, "schedule.shape.timescale"))
        return frame.follow([], [InverseSquareRoot(frame.start, frame.learning_rate, timescale)])


class StableDecayShape(Shape):
    """Constant, then down to `final_factor` at the job's end ("WSD")."""

    name: Literal["stable-decay"]
    decay_start: Duration
    """When the decay begins, counted from the job's start."""
    power: Gamma = 1.0
    """1 is a straight line; above 1 the learning rate falls faster at first."""
    final_factor: Factor = 0.0
    """What is left at the end, as a part of the full learning rate."""

    def spans(self, frame: Frame) -> list[Span]:
        (start,) = frame.lengths.milestones((self.decay_start,), "schedule.shape.decay_start", after=frame.start)
        full, last = frame.learning_rate, self.final_factor * frame.learning_rate
        return frame.follow([start], [Constant(full), Polynomial(start, frame.lengths.total, full, last, self.power)])


class TableShape(Shape):
    """Any learning rate, as a table of factors."""

    name: Literal["table"] = "table"
    factors: Annotated[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], Field(min_length=1)]
    """Parts of the optimizer's learning rate, one per period; they must reach to the job's end."""
    every: Duration = Duration(Fraction(1), "ep")
    """How long each holds."""

    def spans(self, frame: Frame) -> list[Span]:
        period = frame.lengths.period(self.every, "schedule.shape.every")
        needed = math.ceil((frame.lengths.total - frame.start) / period)
        if len(self.factors) < needed:
            raise InvalidSetting(
                "schedule.shape.factors",
                f"{len(self.factors)} factors",
                f"must be at least {needed}, one for every {self.every} to the job's end",
            )
        rates = array("d", (factor * frame.learning_rate for factor in self.factors[:needed]))
        return table_spans(rates, frame.start, frame.stop, period)


def _steps(learning_rate: float, gamma: float, count: int) -> list[Curve]:
    """Constants that are each gamma times the one before; in decimals, so that 0.1 * 0.2 is 0.02."""
    full, factor = Decimal(str(learning_rate)), Decimal(str(gamma))
    return [Constant(float(full * factor**k)) for k in range(count + 1)]


_Shapes = Annotated[
    ConstantShape
    | MultiStepShape
    | StepShape
    | ExponentialShape
    | CosineShape
    | CosineRestartsShape
    | LinearShape
    | PolynomialShape
    | InverseSquareRootShape
    | StableDecayShape
    | TableShape,
    Field(discriminator="name"),
]


def _read_shape(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AnyShape = Annotated[
    _Shapes,
    BeforeValidator(_read_shape, json_schema_input_type=Literal["constant", "cosine", "linear"] | _Shapes),
]
"""A shape with its settings; one that needs none may be given by its name alone."""
