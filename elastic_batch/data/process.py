"""What a data worker does first: let go of what it inherited, and tie its life to the parent's."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
_INHERITED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class WorkerInit:
    """The `worker_init_fn` of every DataLoader in a process that also holds connections of a world. Picklable.

    Args:
        parent: Process id of the parent, where it forks its workers itself; None where another process starts them.
        is_forked: Whether workers inherit the parent's file descriptors.
        forked_by_main_thread: Whether the thread that starts the workers lives as long as the process.
        then: The user's own function of the worker's number, called last.
    """

    parent: int | None
    is_forked: bool
    forked_by_main_thread: bool
    then: Callable[[int], None] | None = None

    @classmethod
    def here(cls, start_method: str | None = None, then: Callable[[int], None] | None = None) -> WorkerInit:
        """For workers that the calling thread is about to start by `start_method` (None: the default)."""
        method = start_method or multiprocessing.get_start_method()
        return cls(
            parent=os.getpid() if method != "forkserver" else None,
            is_forked=method == "fork",
            forked_by_main_thread=threading.current_thread() is threading.main_thread(),
            then=then,
        )

    def __call__(self, worker_id: int) -> None:
        # A signal to the process group is for the parent: it finishes the update, for which it needs its workers.
        for number in _INHERITED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.is_forked:
            signal.set_wakeup_fd(-1)
        if sys.platform == "linux":
            if self.is_forked:
                _release_network_sockets()
            # The kernel sends this signal when the *thread* that forked ends, so any other thread cannot use it. The
            # workers then end with torch's own check of the parent, every 5 seconds.
            if self.forked_by_main_thread:
                _die_with_parent(self.parent)
        if self.then is not None:
            self.then(worker_id)


def _die_with_parent(parent: int | None) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _release_network_sockets() -> None:
    """Drop the references to every inherited TCP or UDP socket.

    While a child holds one, its peer does not see the end of a killed parent's connection, and a listening port stays
    taken. The numbers are pointed at the null device instead of being freed: objects that were copied from the parent
    may still close them, which must not hit a file that was opened since. Pipes and Unix sockets stay: the DataLoader's
    own queues are among them.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and _is_network_socket(int(name)):
            os.dup2(null, int(name), inheritable=False)
    os.close(null)


def _is_network_socket(descriptor: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        inherited = socket.socket(fileno=descriptor)
    except OSError:  # closed meanwhile: the listing's own descriptor
        return False
    family = inherited.family
    inherited.detach()
    return family in (socket.AF_INET, socket.AF_INET6)
