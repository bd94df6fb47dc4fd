"""The ledger: which ranges of samples were committed, read independently of what the trainer believes."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path

from elastic_batch.rundir.lines import parse_line


@dataclass(frozen=True, slots=True)
class Commit:
    """A line of the ledger.

    Args:
        update: Which one, from 1.
        start: Position of its first sample.
        stop: Position after its last sample.
        generation: The world's that committed it.
    """

    update: int
    start: int
    stop: int
    generation: int


class Ledger:
    """The ranges of positions that updates have committed.

    Attributes:
        updates: How many updates brought samples that were not committed before.
        repeated_updates: How many did not: they were done again after a resume from an earlier position.
        last_update: The greatest update; 0 if there is none.

    >>> ledger = Ledger()
    >>> for update, start, stop in [(1, 0, 32), (2, 32, 64), (2, 32, 64), (4, 96, 128)]:
    ...     ledger.add(update, start, stop)
    >>> ledger.updates, ledger.repeated_updates, ledger.ranges
    (3, 1, [(0, 64), (96, 128)])
    >>> ledger.covered(128), ledger.lost(128), ledger.lost(64)
    (96, 32, 0)
    >>> ledger.holes
    32
    """

    def __init__(self) -> None:
        self.updates = self.repeated_updates = self.last_update = 0
        # Disjoint, ascending, never touching: in a whole ledger one range.
        self._starts: list[int] = []
        self._stops: list[int] = []

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The committed ranges [start, stop), disjoint and ascending."""
        return list(zip(self._starts, self._stops, strict=True))

    def add(self, update: int, start: int, stop: int) -> None:
        """Note that an update committed the samples from position `start` to before `stop`."""
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        self.last_update = max(self.last_update, update)
        if last - first == 1 and self._starts[first] <= start and stop <= self._stops[first]:
            self.repeated_updates += 1
            return
        self.updates += 1
        if last > first:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    @property
    def holes(self) -> int:
        """How many samples before the last one of the ledger no update has committed; 0 in a sound run."""
        return self.lost(self._stops[-1]) if self._stops else 0

    def covered(self, position: int) -> int:
        """How many samples before `position` were committed."""
        return sum(max(0, min(stop, position) - start) for start, stop in zip(self._starts, self._stops, strict=True))

    def lost(self, position: int) -> int:
        """How many samples before `position` no update has committed; 0 in a sound run."""
        return position - self.covered(position)


class LedgerReader:
    """Reads a ledger file that may still grow; each time only what was added since.

    Args:
        path: The file; one that is not there has no lines.
        last_bytes: Read only so much of its end; None: all.
    """

    def __init__(self, path: Path, last_bytes: int | None = None) -> None:
        self._path = path
        self._offset = 0
        if last_bytes is not None and path.exists():
            self._offset = max(0, path.stat().st_size - last_bytes)  # a line that is cut there is passed over
        self._ledger = Ledger()

    def read(self, max_bytes: float = math.inf) -> Ledger:
        """The ledger as it is on the disk now; lines that are torn or of another kind are passed over.

        Args:
            max_bytes: About how much more of it to read, where one cannot wait for the whole.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return self._ledger
        with file:
            file.seek(self._offset)
            end = self._offset + max_bytes
            for line in file:
                if not line.endswith(b"\n") or self._offset >= end:
                    break
                self._offset += len(line)
                self._add(line)
        return self._ledger

    def _add(self, line: bytes) -> None:
        record = parse_line(line) or {}
        update, start, stop = (record.get(field) for field in ("update", "start", "stop"))
        if isinstance(update, int) and isinstance(start, int) and isinstance(stop, int):
            self._ledger.add(update, start, stop)
