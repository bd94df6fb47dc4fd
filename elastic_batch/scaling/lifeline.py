"""Processes that do not outlive the one that started them, even if that one is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent ends. Linux only; elsewhere nothing happens.

    Args:
        parent: The parent's process id as the parent knows it: if it has died before this call, this process ends now.
    """
    _on_death_of_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def outlive_parent() -> None:
    """Take `end_with_parent` back: this process notices by itself."""
    _on_death_of_parent(0)


def _on_death_of_parent(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
