"""What all strategies share: the fields of a job file's `schedule` section, their checks, the warm-up."""

from __future__ import annotations

import re
from typing import Annotated, Any, Protocol, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.noise import NoiseForm
from elastic_batch.schedule.curves import Polynomial, Span
from elastic_batch.schedule.durations import Duration
from elastic_batch.schedule.lengths import Lengths
from elastic_batch.schedule.resolved import Schedule
from elastic_batch.schedule.values import ScheduleContext

BatchSize = Annotated[int, Field(gt=0)]
LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class ScheduleSpec(Protocol):
    """What becomes a schedule once the training set and the optimizer are known."""

    def build(self, context: ScheduleContext) -> Schedule:
        """Resolve the schedule.

        Raises:
            InvalidSetting: A setting does not fit the context; the message names it and what to do.
        """
        ...


class Settings(BaseModel):
    """Base of all sections: frozen, unknown fields refused, the text below a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _take_no_truth_for_a_number(cls, fields: Any) -> Any:
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise InvalidSetting(name, value, "must not be true or false")
        return fields

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """Make a section from a program's arguments, with this package's errors instead of pydantic's.

        Raises:
            InvalidSetting: A field is wrong.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise _first_fault(error) from error


class Warmup(Settings):
    """A linear rise of the learning rate at the start, at the first batch."""

    duration: Duration
    """How long."""
    start_factor: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Where it begins, as a part of the learning rate."""


def _read_warmup(value: Any) -> Any:
    return {"duration": value} if isinstance(value, str | Duration) else value


class ScheduleSettings(Settings):
    """Fields that every strategy has."""

    global_batch_size: BatchSize
    """Samples of one update at the start; a multiple of the micro-batch."""
    max_duration: Duration
    """Length of the job: 90ep (epochs), 5e6sp (samples), 250e9tok (tokens)."""
    max_global_batch_size: BatchSize | None = None
    """The batch grows up to here, rounded down to whole micro-batches; null: a tenth of the training set."""
    noise_form: NoiseForm = "linear"
    """Noise scale to keep: linear, lr N / (B (1 - m)), as in the paper; or exact, lr (N / B - 1) / (1 - m)."""
    warmup: Annotated[Warmup | None, BeforeValidator(_read_warmup, json_schema_input_type=str | Warmup | None)] = None
    """Linear rise of the learning rate at the start: a duration, or duration and start_factor."""

    def warmup_spans(self, lengths: Lengths, learning_rate: float) -> list[Span]:
        """Give the warm-up's curve, if there is one.

        Raises:
            InvalidSetting: It is as long as the job.
        """
        if self.warmup is None:
            return []
        stop = lengths.samples(self.warmup.duration, "schedule.warmup")
        if stop >= lengths.total:
            rule = "must be shorter than the job, max_duration"
            raise InvalidSetting("schedule.warmup", str(self.warmup.duration), rule, "Shorten it, or train longer")
        first = self.warmup.start_factor * learning_rate
        return [Span(0, stop, Polynomial(0, stop, first, learning_rate))] if stop else []

    def check_batches(self, context: ScheduleContext) -> None:
        """See that the first batch and the cap, where it is given, are possible.

        Raises:
            InvalidSetting: One of them is not.
        """
        check_batch(self.global_batch_size, context, "schedule.global_batch_size")
        cap = self.max_global_batch_size
        if cap is None:
            return
        field = "schedule.max_global_batch_size"
        if cap < self.global_batch_size:
            rule = f"must not be below the first batch, global_batch_size = {self.global_batch_size}"
            raise InvalidSetting(field, cap, rule, "Raise it, or lower global_batch_size")
        if cap >= context.num_samples:
            rule = f"must be below the training set's {context.num_samples} samples"
            raise InvalidSetting(field, cap, rule, f"A tenth of them, {context.num_samples // 10}, is usual")

    def cap(self, context: ScheduleContext, first: int) -> int:
        """Give the largest batch of whole micro-batches that is allowed, for a first batch of `first`.

        Raises:
            InvalidSetting: The first batch is above it.
        """
        given = self.max_global_batch_size
        limit = context.num_samples // 10 if given is None else given
        if limit < first:
            field, rule = "schedule.max_global_batch_size", f"must not be below the first batch, {first}"
            origin = "null means a tenth of the training set" if given is None else "the raised settings ask for it"
            remedy = f"{origin[0].upper()}{origin[1:]}: set a cap of {first} or more, or begin with a smaller batch"
            raise InvalidSetting(field, given if given is not None else limit, rule, remedy)
        return limit // context.micro_batch_size * context.micro_batch_size


def check_batch(batch: int, context: ScheduleContext, field: str) -> None:
    """See that a batch is a whole number of micro-batches and smaller than the training set.

    Raises:
        InvalidSetting: It is not.
    """
    micro = context.micro_batch_size
    if batch % micro:
        near = sorted({max(batch // micro, 1) * micro, (batch // micro + 1) * micro})
        rule = f"must be a multiple of micro_batch_size = {micro}"
        raise InvalidSetting(field, batch, rule, f"The nearest are {' and '.join(str(size) for size in near)}")
    if batch >= context.num_samples:
        rule = f"must be below the training set's {context.num_samples} samples"
        raise InvalidSetting(field, batch, rule, "Begin with a smaller batch: at the whole set there is no noise left")


def _first_fault(error: ValidationError) -> InvalidSetting:
    fault = error.errors()[0]
    field, context = ".".join(str(part) for part in fault["loc"]), fault.get("ctx", {})
    inner = context.get("error")
    if isinstance(inner, InvalidSetting):
        return inner
    if fault["type"] == "literal_error":
        return UnknownName(field, str(fault["input"]), re.findall(r"'([^']*)'", context["expected"]))
    return InvalidSetting(field, fault["input"], str(inner or fault["msg"]))


def effective_momentum(context: ScheduleContext) -> float:
    """Give the momentum with which the noise scale is computed: 0 for Adam and its kin."""
    return 0.0 if context.adaptive_optimizer else context.momentum
