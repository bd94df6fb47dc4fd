"""The random seeds of an update's passes: each pass draws what belongs to its position."""

from __future__ import annotations

from typing import Self

import torch

from elastic_batch.randomness import GeneratorState, reseed, reseed_torch


class PassSeeds:
    """Seeds the global generators pass by pass; as a context, of one update, it puts them back at the end.

    Seeding Python's and numpy's takes longer than all else that a pass costs by itself, and hardly anybody draws from
    them where a model is trained. So they are seeded in the first update, and later only if somebody drew. Who draws
    for the first time in a later update is noticed at its end: it is to be repeated, and from then on they are seeded.

    Args:
        device: Where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._seeds_all: bool | None = None  # None: they are seeded, and watched
        self._has_strayed = False
        self._before: GeneratorState | None = None
        self._seeded: GeneratorState | None = None

    def __enter__(self) -> Self:
        self._before = GeneratorState(self._device)
        self._has_strayed = False
        return self

    def __exit__(self, *_: object) -> None:
        assert self._before is not None
        self._look()
        if self._seeds_all is False:
            self._before.restore_torch()
        else:
            self._before.restore()
        if self._seeds_all is None and self._seeded is not None:
            self._seeds_all = False
        self._before = self._seeded = None

    def seed(self, seed: int) -> None:
        """A pass begins. Without, it is to leave the generators as they are."""
        if self._seeds_all is False:
            reseed_torch(seed, self._device)
            return
        self._look()
        reseed(seed, self._device)
        if self._seeds_all is None:
            self._seeded = GeneratorState()

    def have_strayed(self) -> bool:
        """Whether a pass of this update, or of the last one, drew from a generator that was not seeded for it."""
        self._look()
        return self._has_strayed

    def _look(self) -> None:
        """See whether anybody drew from Python's or numpy's generator; once is enough."""
        if self._seeds_all is False and self._before is not None and not self._before.others_are_untouched():
            self._has_strayed = self._seeds_all = True
        elif self._seeded is not None and not self._seeded.others_are_untouched():
            self._seeds_all = True
