"""Signals that ask a run to end well: the first one stops after the update under way, a second one acts as usual."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stopping_on_signals(stop: Callable[[str], None], numbers: Collection[signal.Signals] = STOPPING) -> Iterator[None]:
    """While inside, call `stop(name of the signal)` at the first of some signals.

    After the first, the handlers that were there before are back, so that a second Ctrl-C interrupts at once. Outside
    the main thread, where Python allows no handlers, nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    previous = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in previous.items():
            # None: installed by other than Python, and Python cannot put it back.
            if handler is not None and signal.getsignal(number) is on_signal:
                signal.signal(number, handler)

    def on_signal(number: int, _: FrameType | None) -> None:
        restore()
        stop(signal.Signals(number).name)

    for number in numbers:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        restore()
