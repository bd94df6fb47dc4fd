"""The module `os` of a process that dies at a chosen moment: between any two effects on the disk, or amid a write."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

_EFFECTS = {"open", "write", "fsync", "replace", "unlink", "close", "mkdir"}


class Died(BaseException):
    """Stands for the end of the process where a test must live on."""


class DyingOs:
    """Counts effects and calls `die` at the one with number `moment`; of a write, half is still done.

    `die` either ends the process or raises; after it raised, every further effect raises too, as nothing that a dead
    process would have done may happen. Its descriptors are closed, as the kernel would do.
    """

    def __init__(self, moment: int | None, die: Callable[[], None]) -> None:
        self.moment, self.num_effects, self.dead = moment, 0, False
        self._die = die
        self._descriptors: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return (lambda *args, **kwargs: self._effect(name, real, *args, **kwargs)) if name in _EFFECTS else real

    def _effect(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.dead:
            raise Died
        if self.num_effects == self.moment:
            self._end(name, args)
        self.num_effects += 1
        result = real(*args, **kwargs)
        if name == "open":
            self._descriptors.add(result)
        if name == "close":
            self._descriptors.discard(args[0])
        return result

    def _end(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "write":
            os.write(args[0], args[1][: len(args[1]) // 2])
        self.dead = True
        try:
            self._die()
        finally:
            for descriptor in self._descriptors:
                os.close(descriptor)
