"""User code that holds the interpreter: nothing else in the process runs meanwhile, whatever its thread."""

from __future__ import annotations

import ctypes
import signal

SIGNAL, SECONDS = signal.SIGRTMIN, 2


def block_on_signal() -> None:
    """Have `SIGNAL` call a function of C that keeps the interpreter for `SECONDS`."""
    signal.signal(SIGNAL, lambda *_: _block())


def _block() -> None:
    ctypes.PyDLL(None).sleep(SECONDS)
