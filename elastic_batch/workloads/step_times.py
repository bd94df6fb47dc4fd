"""Seconds that a worker's passes and steps take, and what a plan costs with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elastic_batch.schedule import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """What was measured on one worker.

    Args:
        device: On what, in words.
        pass_seconds: Width (micro-batches of a pass) -> seconds of one forward and backward pass.
        step_seconds: Seconds of an update beyond its passes: the optimizer's step.
        width: Of the passes that a worker runs as long as it has so many micro-batches left; then single ones.
    """

    device: str
    pass_seconds: Mapping[int, float]
    step_seconds: float
    width: int

    def update_seconds(self, num_micro_batches: int) -> float:
        """Seconds in which a worker runs its share: as many wide passes as fit, then single ones, then the step.

        >>> StepTimes(device="cpu", pass_seconds={1: 2.0, 4: 5.0}, step_seconds=1.0, width=4).update_seconds(6)
        10.0
        """
        wide, single = divmod(num_micro_batches, self.width)
        return wide * self.pass_seconds[self.width] + single * self.pass_seconds[1] + self.step_seconds


def hours(plan: Plan, num_workers: int, times: StepTimes) -> float:
    """Hours of a plan on equal workers, if reducing gradients and loading data cost nothing."""
    rows = zip(plan.rows, plan.shares(num_workers), strict=True)
    return sum(row.updates * times.update_seconds(share.num_micro_batches) for row, share in rows) / 3600
