"""The connections that a process group opened: found while it forms, shut down when its world has to end."""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Descriptors = dict[int, int]
"""Descriptor -> inode of the socket behind it; a number that was given to another socket since is told by that."""


def open_sockets() -> Descriptors:
    """This process's network sockets."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode) and _is_network_socket(int(name)):
                found[int(name)] = status.st_ino
    return found


def opened_since(before: Descriptors) -> Descriptors:
    """This process's network sockets that were not open at an earlier look."""
    now = open_sockets()
    return {number: inode for number, inode in now.items() if before.get(number) != inode}


class Formation:
    """The forming of a process group, which another thread may break off.

    Args:
        foreign: Gives the inode of a socket that may be opened meanwhile for something else; None: there is none.
    """

    def __init__(self, foreign: Callable[[], int | None] = lambda: None) -> None:
        self._foreign = foreign
        self._before = open_sockets()
        self._aborted = False

    def abort(self) -> None:
        """Make the forming fail soon. Never blocks."""
        self._aborted = True
        shut_down(self.sockets())

    def probe(self) -> None:
        """What is missing while connections are made is missed by who makes them."""

    def sockets(self) -> Descriptors:
        """What was opened since it began."""
        foreign = self._foreign()
        return {number: inode for number, inode in opened_since(self._before).items() if inode != foreign}

    @property
    def is_aborted(self) -> bool:
        return self._aborted


def shut_down(descriptors: Descriptors) -> None:
    """Shut connections down without closing their descriptors, which are their owner's."""
    for number, inode in descriptors.items():
        with suppress(OSError), _borrowed(number) as connection:
            # gloo ends the process when its listening socket fails.
            is_listening = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if os.fstat(connection.fileno()).st_ino == inode and not is_listening:
                connection.shutdown(socket.SHUT_RDWR)


def any_ended(descriptors: Descriptors) -> bool:
    """Whether one of some connections was closed, on this side or the other."""
    for number, inode in descriptors.items():
        try:
            with _borrowed(number) as connection:
                status = os.fstat(connection.fileno())
                look = select.poll()
                look.register(connection, select.POLLRDHUP)
                if status.st_ino != inode or look.poll(0):
                    return True
        except OSError:
            return True
    return False


def _is_network_socket(number: int) -> bool:
    with _borrowed(number) as connection:
        return connection.family in (socket.AF_INET, socket.AF_INET6)


@contextmanager
def _borrowed(number: int) -> Iterator[socket.socket]:
    """The socket behind a descriptor, by a descriptor of its own.

    Raises:
        OSError: The number belongs to nothing any more, or to a file that was opened since.
    """
    duplicate = os.dup(number)
    try:
        connection = socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise
    with connection:
        yield connection
