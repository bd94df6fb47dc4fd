"""A job's durations in samples: its end, and points and lengths within it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule.durations import Duration
from elastic_batch.schedule.values import ScheduleContext

_LONGEST = 2**62
"""Positions are numbers of 64 bits."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Turns the durations of one job into samples."""

    context: ScheduleContext
    total: int
    """The job's duration in samples."""

    @classmethod
    def of(cls, max_duration: Duration, context: ScheduleContext) -> Lengths:
        """Resolve a job's duration.

        Raises:
            InvalidSetting: It is zero, longer than 2**62 samples or a part of itself, or its unit needs what the
                context lacks.
        """
        field = "schedule.max_duration"
        total = max_duration.samples(
            num_samples=context.num_samples, tokens_per_sample=context.tokens_per_sample, field=field
        )
        if total == 0:
            raise InvalidSetting(field, str(max_duration), "must be above 0")
        if total > _LONGEST:
            raise InvalidSetting(field, str(max_duration), "must be at most 2**62 samples")
        return cls(context, total)

    @property
    def end(self) -> int:
        """The total, rounded up to whole micro-batches: nothing is ever padded."""
        return -(-self.total // self.context.micro_batch_size) * self.context.micro_batch_size

    def samples(self, duration: Duration, field: str) -> int:
        """Convert a point or a length."""
        return duration.samples(
            num_samples=self.context.num_samples,
            tokens_per_sample=self.context.tokens_per_sample,
            total=self.total,
            field=field,
        )

    def period(self, duration: Duration, field: str) -> Fraction:
        """Convert what repeats, without rounding.

        Raises:
            InvalidSetting: It is zero.
        """
        context = self.context
        period = duration.exact_samples(context.num_samples, context.tokens_per_sample, self.total, field)
        if period == 0:
            raise InvalidSetting(field, str(duration), "must be above 0")
        return period

    def milestones(
        self, durations: tuple[Duration, ...], field: str, *, after: int = 0, first_index: int = 0
    ) -> list[int]:
        """Convert points that must follow each other, after `after` and before the job's end.

        Args:
            durations: The points.
            field: The list's name, for the error.
            after: In samples.
            first_index: Which place in the list the first of them has.

        Raises:
            InvalidSetting: One is not after the one before it, or past the end.
        """
        found: list[int] = []
        for index, duration in enumerate(durations):
            position = self.samples(duration, field)
            if position >= self.total:
                raise InvalidSetting(
                    f"{field}[{first_index + index}]",
                    str(duration),
                    f"is past the end: must be before {self._words(self.total)}, the job's duration",
                    "Remove it, train longer, or give milestones as parts of the whole ('0.5dur')",
                )
            earliest = found[-1] if found else after
            if position <= earliest:
                before = f"the one before it, {durations[index - 1]}" if index else self._words(earliest)
                raise InvalidSetting(
                    f"{field}[{first_index + index}]",
                    str(duration),
                    f"must be later than {before}" if index or earliest else "must be above 0",
                    "Sort them" if index else "A warm-up must end before the first" if earliest else "",
                )
            found.append(position)
        return found

    def _words(self, position: int) -> str:
        return f"{position} samples ({position / self.context.num_samples:.6g}ep)"
