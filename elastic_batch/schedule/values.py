"""What a schedule is made from and what it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic_batch.errors import InvalidSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleContext:
    """What a specification needs to become a schedule; none of it depends on the number of workers.

    Raises:
        InvalidSetting: A value is out of its range.
    """

    num_samples: int
    """N, samples of the training set."""
    micro_batch_size: int
    """Samples of one unit of work; global batches are multiples of it."""
    learning_rate: float
    """The first parameter group's learning rate, before any scheduler changed it (`initial_lr` where there is one)."""
    momentum: float = 0.0
    """The optimizer's momentum, in [0, 1)."""
    adaptive_optimizer: bool = False
    """Adam, AdamW and the like: the noise scale is computed with a momentum of 0."""
    tokens_per_sample: int | None = None
    """Needed where a duration is given in tokens."""

    def __post_init__(self) -> None:
        for field in ("num_samples", "micro_batch_size", "tokens_per_sample"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise InvalidSetting(field, value, "must be at least 1")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InvalidSetting("learning_rate", self.learning_rate, "must be above 0 and finite")
        if not 0 <= self.momentum < 1:
            raise InvalidSetting("momentum", self.momentum, "must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseValues:
    """What holds for the update that begins at a position."""

    phase: int
    """Index of the phase, from 0."""
    global_batch_size: int
    """Samples of one update, a multiple of the micro-batch; the job's last update takes what remains."""
    learning_rate: float
    """Of the first parameter group; the others keep their ratio to it."""
    momentum: float
    """0.0 where the optimizer has none."""
    until: int
    """The values hold for every update that begins before this position; at it any of them may differ."""
