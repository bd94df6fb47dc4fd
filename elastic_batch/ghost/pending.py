"""The sums of an update that has not committed yet, and the place in them that each norm writes to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """What one norm needs to know of its statistics: [count, means, variances] from `offset` on."""

    num_features: int
    dtype: torch.dtype
    offset: int

    @property
    def values(self) -> slice:
        return slice(self.offset + 1, self.offset + 1 + 2 * self.num_features)


class PendingSums:
    """Float64 sums of ghost statistics over an update, and room where kernels leave those of single ghosts.

    A native kernel called with momentum 1 writes its mean and variance into what it takes for running statistics. Given
    a slice of a flat buffer there, a norm with one ghost costs nothing beyond plain batch norm; the whole buffer is
    added to the sums once a pass, when a norm needs its slice again.

    Args:
        places: One for each norm, in order, without gaps.
        device: Where the norms are.
    """

    def __init__(self, places: list[Place], device: torch.device) -> None:
        self.numel = sum(1 + 2 * place.num_features for place in places)
        self.sums = torch.zeros(self.numel, dtype=torch.float64, device=device)
        self.samples_per_pass: int | None = None
        self._counted = torch.tensor([place.offset for place in places], dtype=torch.long, device=device)
        self._landing = {place.dtype: torch.zeros(self.numel, dtype=place.dtype, device=device) for place in places}
        # Autograd keeps a kernel's running statistics and checks that nobody changed them before the backward pass,
        # which never reads them in training. `.data` has its own version counter, so that emptying is not noticed.
        self._views = [self._landing[place.dtype][place.values].view(2, -1).data.unbind() for place in places]
        self._totals = [self.sums[place.values].view(2, -1) for place in places]
        self._landed: set[int] = set()
        self._num_ghosts = [0] * len(places)

    def clear(self) -> None:
        """Forget everything."""
        self.sums.zero_()
        for landing in self._landing.values():
            landing.zero_()
        self._landed.clear()
        self._num_ghosts = [0] * len(self._num_ghosts)

    def add(self, index: int, moments: Tensor) -> None:
        """Add the moments [k, 2, C] of k ghosts of norm number `index`."""
        self._num_ghosts[index] += moments.size(0)
        self._totals[index].add_(moments.sum(0, dtype=torch.float64))

    def land(self, index: int) -> tuple[Tensor, ...]:
        """Where norm number `index` is to leave (mean, unbiased variance) of one ghost; it must then do so."""
        if index in self._landed:
            self._empty_landing()
        self._landed.add(index)
        return self._views[index]

    def total(self) -> Tensor:
        """The sums so far, as a new tensor."""
        self._empty_landing()
        counts = torch.tensor(self._num_ghosts, dtype=torch.float64, device=self.sums.device)
        return self.sums.index_add(0, self._counted, counts)

    def _empty_landing(self) -> None:
        for landing in self._landing.values():
            self.sums.add_(landing)
            landing.zero_()
        for index in self._landed:
            self._num_ghosts[index] += 1
        self._landed.clear()


class Slot:
    """A norm's connection to the pending sums of its owner."""

    def __init__(self, owner: object, pending: PendingSums, index: int, offset: int) -> None:
        self.owner = owner
        self.pending = pending
        self.sums = pending.sums
        self.index = index
        self.offset = offset
