"""When a worker that ended is started again, and when not. Pure: no clock, no process."""

from __future__ import annotations

import signal
from dataclasses import dataclass

EXIT_STOPPED = 75
"""Of a worker that left or was stopped, as of a run that can be resumed."""
EXIT_IMPOSSIBLE = 2
"""Of a process whose settings are impossible, as argparse and this package's command line have it."""
_MAX_FAILURES = 3
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.1, 5.0
_DELAY_AFTER_LEAVING_SECONDS = 1.0
_LONG_LIFE_SECONDS = 60.0
_NOT_ITS_OWN = {EXIT_STOPPED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
"""Ends that say nothing about the program."""


def growing_delay(in_a_row: int) -> float:
    """Seconds before the next start after so many in a row.

    >>> [growing_delay(in_a_row) for in_a_row in (1, 2, 3)]
    [0.1, 0.2, 0.4]
    """
    return float(_FIRST_DELAY_SECONDS * 2 ** min(in_a_row - 1, 20))


@dataclass(slots=True)
class Restarts:
    """The ends of one slot's processes.

    Attributes:
        in_a_row: Ends since a process last lived for a minute; the longer the row, the longer the delays.
        failures: Ends since the job last made progress that were the program's own.
        position: Where the job was at the last end.
    """

    in_a_row: int = 0
    failures: int = 0
    position: int = -1

    def ended(self, code: int, position: int, lived_seconds: float, *, has_trained: bool) -> float | None:
        """A process of the slot ended.

        A program that fails more than three times in a row, nobody having trained meanwhile, fails for good, and so
        does one that ends well so often without having trained. One whose settings are impossible does so at once,
        unless it has trained before. Being told to leave, or killed, is no failure.

        Args:
            code: Its exit code; minus the signal's number if a signal ended it.
            position: Samples that the job has committed.
            lived_seconds: For how long the process lived.
            has_trained: Whether a process of this program has trained on this machine.

        Returns:
            Seconds to wait before the next start; None: it has failed for good.

        >>> slot = Restarts()
        >>> [slot.ended(1, 0, 5.0, has_trained=False) for _ in range(4)], slot.ended(1, 32, 99.0, has_trained=True)
        ([0.1, 0.2, 0.4, None], 0.1)
        >>> slot.ended(2, 64, 5.0, has_trained=False) is None
        True
        """
        if code == EXIT_IMPOSSIBLE and not has_trained:
            return None
        if position != self.position:
            self.failures, self.position = 0, position
        # Others may have trained meanwhile, which says nothing of how often this slot is worth a new process.
        self.in_a_row = 1 if lived_seconds >= _LONG_LIFE_SECONDS else self.in_a_row + 1
        self.failures += code not in _NOT_ITS_OWN
        if self.failures > _MAX_FAILURES:
            return None
        if code in (0, EXIT_STOPPED):
            return _DELAY_AFTER_LEAVING_SECONDS  # time to hear that the job is over
        if self.in_a_row == 1 and code < 0:
            return 0.0
        return min(_LONGEST_DELAY_SECONDS, growing_delay(self.in_a_row))
