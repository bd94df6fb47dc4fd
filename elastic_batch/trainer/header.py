"""The header of an update: the numbers that workers sum after the gradients, and what may be read out of them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_batch.engines import Wishes
from elastic_batch.noise import NoiseSums

_NUM_NUMBERS = 10
"""How many numbers lead: workers that sent one; that failed; that want to leave; that know of a new world; that want to
stop; weight and loss sum; of the workers with a first pass: how many, sum of |s|^2 / w^2, sum of 1 / w."""

_NO_STATISTICS = torch.empty(0, dtype=torch.float64)


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
    num_leaving: int
    regroup: bool
    stop: bool
    gradient_norm: float
    """Norm of the gradient of the summed losses."""
    seen: tuple[bool, ...]
    """For each parameter, whether any worker has a gradient for it."""

    @property
    def everybody_leaves(self) -> bool:
        return self.num_leaving == self.num_workers

    @property
    def summary(self) -> tuple[float, float, float]:
        """What a worker is told of an update that the others committed without it: see `committed_elsewhere`."""
        return self.weight, self.loss_sum, self.gradient_norm

    @classmethod
    def committed_elsewhere(cls, weight: float, loss_sum: float, gradient_norm: float) -> Header:
        """The header of an update that reached this worker with another one's state."""
        return cls(
            num_workers=0,
            num_failed=0,
            weight=weight,
            loss_sum=loss_sum,
            num_first_passes=0,
            first_pass_squares=0.0,
            first_pass_inverses=0.0,
            num_leaving=0,
            regroup=False,
            stop=False,
            gradient_norm=gradient_norm,
            seen=(),
        )

    def noise_sums(self, dataset_weight: float) -> NoiseSums:
        """What the estimator of the measured noise scale takes of one update."""
        return NoiseSums(
            num_workers=self.num_first_passes,
            square_sum=self.first_pass_squares,
            inverse_weight_sum=self.first_pass_inverses,
            gradient_square=(self.gradient_norm / self.weight) * (self.gradient_norm / self.weight),
            weight=self.weight,
            dataset_weight=dataset_weight,
        )


class Tally:
    """What one worker adds to the header while it runs its share.

    Weights that are given as tensors, and the losses, stay on a GPU until the end: reading them would wait for it.

    Args:
        device: Where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_on_host = device.type == "cpu"
        self.begin()

    def begin(self) -> None:
        """Forget everything: the update starts, or starts again."""
        self.weight: Tensor | float = 0.0
        self.loss_sum: Tensor | float = 0.0
        self.first_pass_weight: Tensor | float | None = None
        self.first_pass_norms: list[Tensor] = []

    def add(self, loss: Tensor, count: int, weight: Tensor | float) -> None:
        """Count one pass: its loss sum, as a 0-dim tensor times a count, and its weight."""
        self.loss_sum = self.loss_sum + self._read(loss) * count
        self.weight = self.weight + self._read(weight)
        if self.first_pass_weight is None:
            self.first_pass_weight = self.weight

    def pack(
        self, *, failed: bool, wishes: Wishes, seen: tuple[bool, ...], statistics: Tensor, divisor: float
    ) -> Tensor:
        """This worker's header.

        Args:
            failed: Whether this worker could not run its share; its other numbers are then void.
            wishes: What to ask of the others.
            seen: For each parameter, whether this worker has a gradient for it.
            statistics: Float64 sums of the batch norms.
            divisor: What loss sums were divided by before their backward.

        Returns:
            Float64 vector.
        """
        flags = (1, failed, wishes.leave, wishes.regroup, wishes.stop is not None)
        numbers = (*flags, self.weight, self.loss_sum, *self._first_pass(divisor))
        known = [0 if isinstance(number, Tensor) else number for number in numbers]
        header = torch.frombuffer(array("d", [*known, *seen]), dtype=torch.float64)
        if not self._is_on_host:
            header = header.to(self._device, non_blocking=True)
            for place, number in enumerate(numbers):
                if isinstance(number, Tensor):
                    header[place] = number
        return torch.cat([header, statistics]) if statistics.numel() else header

    def _first_pass(self, divisor: float) -> tuple[Tensor | float, ...]:
        """Whether there was a first pass with a weight, its |s|^2 / w^2, and 1 / w."""
        weight = self.first_pass_weight
        if weight is None or not self.first_pass_norms:
            return 0, 0, 0
        if isinstance(weight, Tensor):
            counts: Tensor | float = weight > 0
            inverse: Tensor | float = torch.where(weight > 0, 1 / weight, 0.0)
        else:
            counts, inverse = weight > 0, 1 / weight if weight > 0 else 0.0
        if self._is_on_host:
            norm: Tensor | float = _joint_norm(self.first_pass_norms)
        else:
            norm = torch.linalg.vector_norm(torch.stack(self.first_pass_norms), dtype=torch.float64)
        scaled = norm * (inverse * divisor)
        return counts, scaled * scaled, inverse  # a power of a float raises where this is infinite

    def _read(self, number: Tensor | float) -> Tensor | float:
        """A number in float64; one that is on a GPU stays there."""
        if not isinstance(number, Tensor):
            return number
        return number.item() if self._is_on_host else number.detach().double()


def unpack(header: Tensor, norms: Sequence[Tensor], num_parameters: int, *, divisor: float) -> tuple[Header, Tensor]:
    """Read a reduced header: two copies to the host.

    Args:
        header: As packed, summed over the workers.
        norms: Norms that make up the reduced gradient's; none where no backward ran.
        num_parameters: How many parameters have a bit in it.
        divisor: What loss sums were divided by before their backward.

    Returns:
        The header, and the summed statistics of the batch norms (still on the device).
    """
    end = _NUM_NUMBERS + num_parameters
    rest = _NO_STATISTICS
    if header.numel() > end:
        header, rest = header[:end], header[end:]
    values = header.tolist()
    workers, void, leave, regroup, stop, weight, loss, passes, squares, inverses = values[:_NUM_NUMBERS]
    read = Header(
        num_workers=round(workers),
        num_failed=round(void),
        weight=weight,
        loss_sum=loss,
        num_first_passes=round(passes),
        first_pass_squares=squares,
        first_pass_inverses=inverses,
        num_leaving=round(leave),
        regroup=regroup > 0,
        stop=stop > 0,
        gradient_norm=_joint_norm(norms) * divisor,
        seen=tuple(map(bool, values[_NUM_NUMBERS:])),
    )
    return read, rest


def _joint_norm(norms: Sequence[Tensor]) -> float:
    """Of 0-dim tensors on one device, which is waited for once."""
    if not norms:
        return 0.0
    return math.hypot(*([norm.item() for norm in norms] if norms[0].is_cpu else torch.stack(list(norms)).tolist()))
