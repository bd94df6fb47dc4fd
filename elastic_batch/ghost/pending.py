"""The sums of an update that has not committed yet, and the place in them that each norm writes to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where the sums of one norm are, [count, means, variances], and the type of its statistics."""

    num_features: int
    dtype: torch.dtype
    offset: int

    @property
    def length(self) -> int:
        return 1 + 2 * self.num_features

    @property
    def all(self) -> slice:
        return slice(self.offset, self.offset + self.length)

    @property
    def values(self) -> slice:
        return slice(self.offset + 1, self.offset + self.length)


class PendingSums:
    """Float64 sums of ghost statistics over an update.

    Norms hand their statistics in one by one, but it is once a pass that they are added to the sums, all at the same
    time: when a norm hands in something for the second time.

    Args:
        places: One for each norm, in order, without gaps.
        device: Where the norms are.
    """

    def __init__(self, places: list[Place], device: torch.device) -> None:
        self.numel = sum(place.length for place in places)
        self.sums = torch.zeros(self.numel, dtype=torch.float64, device=device)
        self.samples_per_pass: int | None = None
        self._places = places
        self._moments: dict[int, Tensor] = {}  # all of as many ghosts
        self._num_ghosts = 0
        self._landing = _Landing(places, device)

    def clear(self) -> None:
        """Forget everything."""
        if not self._places:
            return
        self.sums.zero_()
        self._moments.clear()
        self._landing.clear()

    def add(self, index: int, moments: Tensor) -> None:
        """Hand in the moments [k, 2, C] of k ghosts of norm number `index`."""
        if index in self._moments or len(moments) != self._num_ghosts:
            self._add_moments()
            self._num_ghosts = len(moments)
        self._moments[index] = moments

    def land(self, index: int) -> tuple[Tensor, Tensor]:
        """Where norm number `index` is to leave (mean, unbiased variance) of one ghost; it must then do so."""
        if index in self._landing.used:
            self._landing.add_to(self.sums)
        return self._landing.use(index)

    def total(self) -> Tensor:
        """The sums so far, as a new tensor; only an empty one is always the same."""
        if not self._places:
            return self.sums
        self._add_moments()
        self._landing.add_to(self.sums)
        return self.sums.clone()

    def _add_moments(self) -> None:
        if not self._moments:
            return
        any_moments = next(iter(self._moments.values()))
        one = any_moments.new_ones((any_moments.size(0), 1))
        blocks = []
        for index, place in enumerate(self._places):
            moments = self._moments.get(index)
            blocks += [one.new_zeros((len(one), place.length))] if moments is None else [one, moments.flatten(1)]
        self.sums.add_(torch.cat(blocks, dim=1).sum(0, dtype=torch.float64))
        self._moments.clear()


class _Landing:
    """Room where kernels leave mean and variance of single ghosts.

    A native kernel called with momentum 1 writes them into what it takes for running statistics. Given a slice of a
    flat buffer there, a norm with one ghost costs nothing beyond plain batch norm.
    """

    def __init__(self, places: list[Place], device: torch.device) -> None:
        self.used: set[int] = set()
        self._places = places
        numel = sum(place.length for place in places)
        self._rooms = {place.dtype: torch.zeros(numel, dtype=place.dtype, device=device) for place in places}
        for place in places:
            self._rooms[place.dtype][place.offset] = 1  # the count, ready to be added
        self._empty = {dtype: room.clone() for dtype, room in self._rooms.items()}
        # Autograd keeps a kernel's running statistics and checks that nobody changed them before the backward pass,
        # which never reads them in training. `.data` has its own version counter, so that clearing is not noticed.
        views = [self._rooms[place.dtype][place.values].view(2, -1).data for place in places]
        self._pairs = [(view[0], view[1]) for view in views]

    def clear(self) -> None:
        for dtype, room in self._rooms.items():
            room.copy_(self._empty[dtype])  # what is not finite would stay, even at momentum 1
        self.used.clear()

    def use(self, index: int) -> tuple[Tensor, Tensor]:
        self.used.add(index)
        return self._pairs[index]

    def add_to(self, sums: Tensor) -> None:
        if len(self.used) == len(self._places):
            for room in self._rooms.values():
                sums.add_(room)
        else:  # the others hold what an earlier pass left
            for place in (self._places[index] for index in self.used):
                sums[place.all].add_(self._rooms[place.dtype][place.all])
        self.used.clear()


class Slot:
    """A norm's connection to the pending sums of its owner."""

    def __init__(self, owner: object, pending: PendingSums, index: int, offset: int) -> None:
        self.owner = owner
        self.pending = pending
        self.sums = pending.sums
        self.index = index
        self.offset = offset
