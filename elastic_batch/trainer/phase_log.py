"""One log line whenever the batch, the momentum or the world changes, naming the rule."""

from __future__ import annotations

import logging

from elastic_batch.trainer.plan import UpdatePlan

logger = logging.getLogger(__name__)


class PhaseLog:
    """Says what holds from an update on, if it differs from what was said before.

    Args:
        rule: What the schedule does, in words.
        spares: Workers that are meant to have no micro-batches.
    """

    def __init__(self, rule: str, spares: int) -> None:
        self._rule = rule
        self._spares = spares
        self._said: tuple[object, ...] | None = None

    def show(self, plan: UpdatePlan, world_size: int) -> None:
        """Log the update's values, if they are new."""
        values = plan.values
        news = (values.global_batch_size, values.momentum, world_size)
        if news == self._said:
            return
        self._said = news
        num_micro_batches = values.global_batch_size // plan.micro_batch_size
        logger.info(
            "update %d, position %d: global batch %d (micro-batches: %d, workers: %d), lr %g, momentum %g, by %s",
            plan.index,
            plan.start,
            values.global_batch_size,
            num_micro_batches,
            world_size,
            values.learning_rate,
            values.momentum,
            self._rule,
        )
        idle = world_size - num_micro_batches - self._spares
        if idle > 0:
            logger.warning(
                "%d of %d workers have no micro-batch in this phase: they wait for the others at each update",
                idle,
                world_size,
            )
