"""What workers print: shown line by line under their names, and kept in files."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

_LONGEST_LINE_BYTES = 1 << 16
_LINES_IN_MEMORY = 20

Show = Callable[[str], None]
"""Shows one line to whoever watches."""


def unfailing(show: Show) -> Show:
    """Shows lines as `show` does, and goes on where that fails: no training ends for want of a spectator."""
    has_complained = False

    def show_on(line: str) -> None:
        nonlocal has_complained
        try:
            show(line)
        except BrokenPipeError:
            return  # whoever watched has seen enough (`| head`)
        except Exception as error:  # a full disk under `> out.log`, a letter that a terminal does not know
            if not has_complained:
                has_complained = True
                logger.warning("not all that workers print can be shown, training goes on: %s", error)

    return show_on


class OutputLog:
    """The output of one slot, whatever process is in it.

    Args:
        slot: What its lines begin with.
        show: Takes each whole line, prefix included.
        path: Where everything is kept as it came; appended to. None: nowhere.

    Attributes:
        last_lines: The newest ones, for a report on a failure.
    """

    def __init__(self, slot: str, show: Show, path: Path | None) -> None:
        self.last_lines: deque[str] = deque(maxlen=_LINES_IN_MEMORY)
        self._prefix = f"[{slot}] "
        self._show = show
        self._unfinished = b""
        self._file: BinaryIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def take(self, data: bytes) -> None:
        """Take what was printed, in pieces of any length."""
        if self._file is not None:
            self._keep(self._file, data)
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._unfinished) > _LONGEST_LINE_BYTES:
            self.end_line()

    def end_line(self) -> None:
        """Whoever printed has ended: what it left unfinished is a line too."""
        line, self._unfinished = self._unfinished, b""
        if line:
            self._line(line)

    def close(self) -> None:
        """Close the file."""
        self.end_line()
        if self._file is not None:
            self._file.close()

    def _line(self, line: bytes) -> None:
        # A progress bar draws over itself: its last state is what a terminal would show.
        text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
        self.last_lines.append(text)
        self._show(self._prefix + text)

    def _keep(self, file: BinaryIO, data: bytes) -> None:
        try:
            file.write(data)
        except OSError as error:  # a full disk ends no training
            file.close()
            self._file = None
            self._show(f"{self._prefix}its log is no longer kept: {error}")
