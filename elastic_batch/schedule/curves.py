"""Learning-rate curves over the position: each rises, falls or stays, and never turns.

`value(position)` is the learning rate; `until(position)` the first position at which it may differ from that;
`description(start, stop)` a text that is another one for every curve that differs from start to before stop.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from elastic_batch.errors import InvalidSetting


class Curve(Protocol):
    """A learning rate as a function of the position, monotone where it is used."""

    def value(self, position: int) -> float: ...

    def until(self, position: int) -> float: ...

    def description(self, start: int, stop: int) -> str: ...


class _Formula:
    """A curve that is another one as a whole."""

    __slots__ = ()

    def description(self, start: int, stop: int) -> str:
        return repr(self)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch [start, stop) of positions with one curve; spans follow each other without a gap."""

    start: int
    stop: int
    curve: Curve


def ends_of(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The learning rates that spans begin and end with; between these they never turn.

    Raises:
        InvalidSetting: One is negative or not finite, or all are 0.
    """
    ends = [(span.curve.value(span.start), span.curve.value(span.stop - 1)) for span in spans]
    for first, last in ends:
        if not (0 <= first < math.inf and 0 <= last < math.inf):
            raise InvalidSetting("schedule", (first, last), "learning rates must be finite and not negative")
    if not any(first or last for first, last in ends):
        raise InvalidSetting("schedule", 0.0, "the learning rate is 0 throughout", "Begin with a schedule that trains")
    return ends


@dataclass(frozen=True, slots=True)
class Constant(_Formula):
    """The same learning rate throughout."""

    learning_rate: float

    def value(self, position: int) -> float:
        return self.learning_rate

    def until(self, position: int) -> float:
        return math.inf


@dataclass(frozen=True, slots=True)
class _Continuous(_Formula):
    start: int
    stop: int
    first: float
    last: float

    def progress(self, position: int) -> float:
        return min(1.0, (position - self.start) / (self.stop - self.start))

    def until(self, position: int) -> float:
        return position + 1


@dataclass(frozen=True, slots=True)
class Polynomial(_Continuous):
    """From `first` to `last` as last + (first - last) (1 - x)^power, x from 0 at `start` to 1 at `stop`."""

    power: float = 1.0

    def value(self, position: int) -> float:
        left: float = (1.0 - self.progress(position)) ** self.power
        return self.first * left + self.last * (1.0 - left)


@dataclass(frozen=True, slots=True)
class Cosine(_Continuous):
    """From `first` to `last` along half a cosine wave (Loshchilov, Hutter, "SGDR", ICLR 2017, eq. 5)."""

    def value(self, position: int) -> float:
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * self.progress(position))) / 2


@dataclass(frozen=True, slots=True)
class Exponential(_Formula):
    """Multiplied by `gamma` every `period` samples, evenly."""

    start: int
    first: float
    gamma: float
    period: float

    def value(self, position: int) -> float:
        try:
            return float(self.first * self.gamma ** ((position - self.start) / self.period))
        except OverflowError:
            return math.inf

    def until(self, position: int) -> float:
        return position + 1


@dataclass(frozen=True, slots=True)
class InverseSquareRoot(_Formula):
    """first / sqrt(1 + (position - start) / timescale)."""

    start: int
    first: float
    timescale: float

    def value(self, position: int) -> float:
        return self.first / math.sqrt(1.0 + (position - self.start) / self.timescale)

    def until(self, position: int) -> float:
        return position + 1


@dataclass(frozen=True, slots=True)
class Table:
    """Entry k holds from start + k period on, period = numerator / denominator samples; the last one to the end."""

    entries: array[float]
    start: int
    numerator: int
    denominator: int

    def value(self, position: int) -> float:
        return self.entries[min(self._entry(position), len(self.entries) - 1)]

    def until(self, position: int) -> float:
        return self.begin(self._entry(position) + 1)

    def description(self, start: int, stop: int) -> str:
        first, last = (min(self._entry(position), len(self.entries) - 1) for position in (start, stop - 1))
        entries = self.entries[first : last + 1]
        if min(entries) == max(entries):
            return Constant(entries[0]).description(start, stop)
        period = f"{self.start} + {self.numerator}/{self.denominator}"
        return f"{hashlib.sha256(entries.tobytes()).hexdigest()} every {period}"

    def begin(self, entry: int) -> int:
        """Give the first position at which an entry holds."""
        return self.start - (-entry * self.numerator // self.denominator)

    def _entry(self, position: int) -> int:
        return (position - self.start) * self.denominator // self.numerator
