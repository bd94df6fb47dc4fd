"""What steps, ramp and adaptive share: the batch is given, and the learning rate has a shape of its own."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule.batches import Batch, Scaling
from elastic_batch.schedule.curves import Span, ends_of
from elastic_batch.schedule.durations import Duration
from elastic_batch.schedule.lengths import Lengths
from elastic_batch.schedule.resolved import Phase, Schedule
from elastic_batch.schedule.settings import BatchSize, ScheduleSettings, check_batch
from elastic_batch.schedule.shapes import AnyShape, ConstantShape, Frame
from elastic_batch.schedule.values import ScheduleContext


@dataclass(frozen=True, slots=True)
class Stretch:
    """Positions [start, stop) with one rule for the batch; the full learning rate and the momentum go with it."""

    start: int
    stop: int
    batch: Batch
    learning_rate: float
    momentum: float


class GivenBatchSettings(ScheduleSettings):
    """Fields of the strategies in which the batch does not depend on the learning rate."""

    max_global_batch_size: BatchSize | None = None
    """No batch may be larger; null: below the training set."""
    shape: AnyShape = Field(default_factory=ConstantShape)
    """The learning rate: a name, or a name with settings."""
    learning_rate_scaling: Scaling = "none"
    """How the learning rate follows the batch: none, linear, or sqrt (usual for Adam)."""

    def build(self, context: ScheduleContext) -> Schedule:
        """Resolve the schedule.

        Raises:
            InvalidSetting: A setting does not fit the training set, the micro-batch or the optimizer.
        """
        self.check_batches(context)
        lengths = Lengths.of(self.max_duration, context)
        stretches = self.stretches(context, lengths)
        # A batch that is given along a line is largest at one of its ends.
        sizes = [one.batch.allocate(at, 0.0)[0] for one in stretches for at in (one.start, one.stop - 1)]
        return Schedule(
            num_samples=context.num_samples,
            micro_batch_size=context.micro_batch_size,
            end=lengths.end,
            base_learning_rate=context.learning_rate,
            global_batch_size=sizes[0],
            baseline_batch_size=self.global_batch_size,
            max_global_batch_size=max(sizes),
            noise_form=self.noise_form,
            rule=self._words(),
            phases=self._phases(lengths, stretches),
        )

    @abstractmethod
    def stretches(self, context: ScheduleContext, lengths: Lengths) -> list[Stretch]:
        """Give the batches, and the full learning rate and momentum with each."""

    @abstractmethod
    def name_batches(self) -> str:
        """Say what the batch does."""

    def _phases(self, lengths: Lengths, stretches: list[Stretch]) -> tuple[Phase, ...]:
        known: dict[float, list[Span]] = {}
        phases = []
        for stretch in stretches:
            rate = stretch.learning_rate
            if rate not in known:
                known[rate] = self._spans(lengths, rate)
            for span in known[rate]:
                start, stop = max(span.start, stretch.start), min(span.stop, stretch.stop)
                if start < stop:
                    phases.append(Phase(start, stop, span.curve, stretch.batch, stretch.momentum))
        return tuple(phases)

    def _spans(self, lengths: Lengths, learning_rate: float) -> list[Span]:
        warmup = self.warmup_spans(lengths, learning_rate)
        spans = warmup + self.shape.spans(Frame(warmup[-1].stop if warmup else 0, lengths, learning_rate))
        ends_of(spans)  # refuses rates that no optimizer takes
        return spans

    def check_size(self, batch: int, context: ScheduleContext, field: str) -> None:
        """See that a batch is possible.

        Raises:
            InvalidSetting: It is not.
        """
        check_batch(batch, context, field)
        if self.max_global_batch_size is not None and batch > self.max_global_batch_size:
            rule = f"must not be above max_global_batch_size = {self.max_global_batch_size}"
            raise InvalidSetting(field, batch, rule)

    def _words(self) -> str:
        scaling = "" if self.learning_rate_scaling == "none" else f", lr follows it ({self.learning_rate_scaling})"
        return f"{self.name_batches()}, lr {self.shape.name}{scaling}"


def _need_no_first_batch(schema: dict[str, Any]) -> None:
    schema["required"].remove("global_batch_size")


class PointsSettings(GivenBatchSettings):
    """Base of the strategies with a list of points: one at 0 gives the first batch."""

    model_config = ConfigDict(json_schema_extra=_need_no_first_batch)

    @model_validator(mode="before")
    @classmethod
    def _fill_first_batch(cls, data: Any) -> Any:
        return _first_from_points(data)


def read_points(value: Any) -> Any:
    """Take "0:768 250e9tok:1536" apart; anything else is passed through.

    >>> read_points("0:768 0.5dur:1536")
    [{'at': '0', 'global_batch_size': 768}, {'at': '0.5dur', 'global_batch_size': 1536}]
    """
    if not isinstance(value, str):
        return value
    pairs = [word.partition(":") for word in value.split()]
    if not pairs or not all(batch.isdecimal() for _, _, batch in pairs):
        raise ValueError("must be a list of POSITION:BATCH with spaces in between, as in '0:768 250e9tok:1536'")
    return [{"at": at, "global_batch_size": int(batch)} for at, _, batch in pairs]


def _first_from_points(data: Any) -> Any:
    """Fill in the first batch from a point at 0, where it is not given beside the list.

    Raises:
        InvalidSetting: Both are given and differ.
    """
    try:
        points = read_points(data.get("points")) if isinstance(data, dict) else None
    except ValueError:
        return data  # the field's own check says it with the field's name
    first = points[0] if isinstance(points, list | tuple) and points else None
    if isinstance(first, BaseModel):
        first = first.model_dump()
    if not isinstance(first, dict) or not _is_start(first.get("at")):
        return data
    size = first.get("global_batch_size")
    if size is None or data.get("global_batch_size", size) == size:
        return data if size is None else {**data, "global_batch_size": size}
    rule = f"must be what points begins with, {size}"
    raise InvalidSetting("global_batch_size", data["global_batch_size"], rule, "Leave one of them out")


def _is_start(at: Any) -> bool:
    """Whether a point is where the job begins, however it is written."""
    try:
        return at == 0 or Duration.parse(at).amount == 0
    except InvalidSetting:
        return False  # the field's own check says it with the field's name
