"""How a phase shares out a wanted noise scale between the global batch and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from elastic_batch.noise import NoiseForm, at_equal_noise, batch_size_after_drop

Rule = Literal["linear", "sqrt"]
Scaling = Literal["none", "linear", "sqrt"]

# A wanted batch that rounding left just below a grid value (639.9999999999999) is that value.
_ROUNDING = 1 + 1e-12


class Batch(Protocol):
    """The global batch of a phase. It rises, falls or stays as the position grows, and never turns."""

    def allocate(self, position: int, learning_rate: float) -> tuple[int, float]:
        """Give the global batch at a position, and the learning rate with it.

        Args:
            position: Samples committed.
            learning_rate: What the phase's curve gives at the position.
        """
        ...

    def until(self, position: int) -> float:
        """Give the first position at which the batch may differ, if the curve stays where it is."""
        ...


@dataclass(frozen=True, slots=True)
class FixedBatch:
    """The same global batch throughout; the learning rate is the curve's."""

    global_batch_size: int

    def allocate(self, position: int, learning_rate: float) -> tuple[int, float]:
        return self.global_batch_size, learning_rate

    def until(self, position: int) -> float:
        return math.inf


@dataclass(frozen=True, slots=True)
class LinearBatch:
    """A straight line between two global batches, rounded down to whole micro-batches."""

    start: int
    stop: int
    first: int
    last: int
    micro_batch_size: int
    base: int
    scaling: Scaling

    def _batch(self, position: int) -> int:
        length = self.stop - self.start
        micro_batches = (self.first * length + (self.last - self.first) * (position - self.start)) // length
        return micro_batches // self.micro_batch_size * self.micro_batch_size

    def allocate(self, position: int, learning_rate: float) -> tuple[int, float]:
        batch = self._batch(position)
        return batch, scaled(learning_rate, self.base, batch, self.scaling)

    def until(self, position: int) -> float:
        batch, length, rise = self._batch(position), self.stop - self.start, self.last - self.first
        if rise > 0:  # the line reaches the next grid value
            return self.start - (-(batch + self.micro_batch_size - self.first) * length // rise)
        if rise < 0:  # the line is below this grid value
            return self.start + (self.first - batch) * length // -rise + 1
        return math.inf


@dataclass(frozen=True, slots=True)
class Trade:
    """What a batch that grows from `first` is worth in learning rate.

    linear: the noise scale is kept exactly, in the linear or exact form (Smith et al., 2018, section 4).
    sqrt: where the learning rate was to be divided by a, it is divided by sqrt(a) and the batch is multiplied by a
    (Seesaw, 2025; the square-root rule of Malladi et al., 2022, for Adam).
    """

    num_samples: int
    micro_batch_size: int
    first: int
    """B before any growth."""
    cap: int
    """Largest batch, a whole number of micro-batches."""
    noise_form: NoiseForm
    rule: Rule

    def batch(self, drop: float) -> int:
        """Give the largest batch of whole micro-batches that is not above the cap or what a drop asks for.

        Args:
            drop: By how much the learning rate was to be divided, >= 1; infinity where it falls to 0.
        """
        if math.isinf(drop):
            return self.cap
        wanted = batch_size_after_drop(self.first, drop, num_samples=self.num_samples, form=self.noise_form)
        if wanted >= self.cap:
            return self.cap
        return int(wanted * _ROUNDING / self.micro_batch_size) * self.micro_batch_size

    def learning_rate(self, learning_rate: float, batch: int) -> float:
        """Move a learning rate that was meant for `first` to a larger batch."""
        if self.rule == "sqrt":
            return learning_rate * math.sqrt(batch / self.first)
        return at_equal_noise(learning_rate, self.first, batch, num_samples=self.num_samples, form=self.noise_form)

    def exact_learning_rate(self, learning_rate: Fraction, batch: int) -> float:
        """Move a learning rate as `learning_rate` does, rounding once."""
        if self.rule == "sqrt":
            return self.learning_rate(float(learning_rate), batch)
        exact = at_equal_noise(learning_rate, self.first, batch, num_samples=self.num_samples, form=self.noise_form)
        return float(exact)


@dataclass(frozen=True, slots=True)
class ConvertedBatch:
    """A batch that grows as the learning rate falls below its peak; what the grid and the cap leave over divides it."""

    trade: Trade
    peak: float
    peak_position: int
    """Before it the learning rate warms up, and the batch stays at its first size."""
    floor: float
    """The batch does not grow for a learning rate below this one, because the learning rate comes back to it."""

    def allocate(self, position: int, learning_rate: float) -> tuple[int, float]:
        if position < self.peak_position:
            return self.trade.first, learning_rate
        reference = max(learning_rate, self.floor)
        batch = self.trade.batch(self.peak / reference if reference else math.inf)
        # min: division and multiplication may round to just above the peak.
        return batch, min(self.peak, self.trade.learning_rate(learning_rate, batch))

    def until(self, position: int) -> float:
        return math.inf if position >= self.peak_position else self.peak_position


def scaled(learning_rate: float, old_batch_size: int, new_batch_size: int, scaling: Scaling) -> float:
    """Change a learning rate with the batch: not at all, in proportion, or with the square root."""
    match scaling:
        case "none":
            return learning_rate
        case "linear":
            return learning_rate * new_batch_size / old_batch_size
        case "sqrt":
            return learning_rate * math.sqrt(new_batch_size / old_batch_size)
