"""The header of an update: the numbers that workers sum after the gradients, and what may be read out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_batch.engines import Wishes
from elastic_batch.noise import NoiseSums

_FIELDS = ("workers", "void", "weight", "loss", "passes", "squares", "inverses", "leave", "regroup", "stop")
"""Names of the leading numbers: workers that sent one; workers that failed; weight and loss sum; of the workers with a first
pass: how many, sum of |s|^2 / w^2, sum of 1 / w; workers that want to leave, know of a new world, want to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A reduced header, on the host."""

    num_workers: int
    num_failed: int
    weight: float
    loss_sum: float
    num_first_passes: int
    first_pass_squares: float
    first_pass_inverses: float
    leave: bool
    regroup: bool
    stop: bool
    gradient_norm: float
    """Norm of the reduced sum of gradients."""
    seen: tuple[bool, ...]
    """For each parameter, whether any worker has a gradient for it."""

    def noise_sums(self, dataset_weight: float) -> NoiseSums:
        """What the estimator of the measured noise scale takes of one update."""
        return NoiseSums(
            num_workers=self.num_first_passes,
            first_pass_squares=self.first_pass_squares,
            first_pass_inverses=self.first_pass_inverses,
            gradient_square=(self.gradient_norm / self.weight) ** 2,
            weight=self.weight,
            dataset_weight=dataset_weight,
        )


class Tally:
    """What one worker adds to the header while it runs its share; its numbers stay on the device until the end.

    Args:
        device: Where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self.begin()

    def begin(self) -> None:
        """Forget everything: the update starts, or starts again."""
        self.weight = self._zero
        self.loss_sum = self._zero
        self.first_pass_weight: Tensor | None = None
        self.first_pass_norms: list[Tensor] = []

    def add(self, loss_sum: Tensor, weight: Tensor | float) -> None:
        """Count one pass: its loss sum (0-dim) and its weight."""
        self.loss_sum = self.loss_sum + loss_sum.detach()
        self.weight = self.weight + weight
        if self.first_pass_weight is None:
            self.first_pass_weight = self.weight

    def pack(self, *, failed: bool, wishes: Wishes, stop: bool, seen: Tensor, statistics: Tensor) -> Tensor:
        """This worker's header.

        Args:
            failed: Whether this worker could not run its share; its other numbers are then void.
            wishes: What to ask of the others.
            stop: Whether this worker wants the run to end after this update.
            seen: Float64 [num_parameters], 1 where this worker has a gradient.
            statistics: Float64 sums of the batch norms.

        Returns:
            Float64 vector.
        """
        one, zero = self._zero + 1, self._zero
        passes = squares = inverses = zero
        if self.first_pass_weight is not None and self.first_pass_norms:
            weight = self.first_pass_weight
            square = torch.stack([norm.double() for norm in self.first_pass_norms]).square().sum()
            counts = weight > 0
            passes = counts.double()
            squares = torch.where(counts, square / weight.square(), zero)
            inverses = torch.where(counts, 1 / weight, zero)
        flags = [self._zero + float(flag) for flag in (wishes.leave, wishes.regroup, stop)]
        numbers = [one, self._zero + float(failed), self.weight, self.loss_sum, passes, squares, inverses, *flags]
        return torch.cat([torch.stack(numbers), seen, statistics])


def unpack(header: Tensor, norms: Sequence[Tensor], num_parameters: int) -> tuple[Header, Tensor]:
    """Read a reduced header: one copy to the host.

    Args:
        header: As packed, summed over the workers.
        norms: Norm of each reduced bucket.
        num_parameters: How many parameters have a bit in it.

    Returns:
        The header, and the summed statistics of the batch norms (still on the device).
    """
    end = len(_FIELDS) + num_parameters
    norm = torch.stack([norm.double() for norm in norms]).square().sum().sqrt()
    *values, gradient_norm = torch.cat([header[:end], norm.reshape(1)]).tolist()
    field = dict(zip(_FIELDS, values, strict=False))
    read = Header(
        num_workers=round(field["workers"]),
        num_failed=round(field["void"]),
        weight=field["weight"],
        loss_sum=field["loss"],
        num_first_passes=round(field["passes"]),
        first_pass_squares=field["squares"],
        first_pass_inverses=field["inverses"],
        leave=field["leave"] > 0,
        regroup=field["regroup"] > 0,
        stop=field["stop"] > 0,
        gradient_norm=gradient_norm,
        seen=tuple(value > 0 for value in values[len(_FIELDS) :]),
    )
    return read, header[end:]
