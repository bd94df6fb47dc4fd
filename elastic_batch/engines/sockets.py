"""The connections of a process group: found while it forms, shut down when its world has to end."""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

Descriptors = dict[int, int]
"""Descriptor -> inode of the socket behind it; a number that was given to another socket since is told by that."""
Address = tuple[str, int]
"""Host and port, in numbers."""
ANY_PORT = 0


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


def listening(descriptors: Descriptors) -> list[Address]:
    """Where those of some sockets that listen can be reached."""
    found = []
    for number in descriptors:
        with suppress(OSError), _borrowed(number) as connection:
            if _is_listening(connection):
                found.append(connection.getsockname()[:2])
    return found


def connections_between(descriptors: Descriptors, here: Collection[Address], peers: Collection[Address]) -> Descriptors:
    """Those of some sockets that were accepted at one of our addresses, or lead to one of our peers'."""
    found = {}
    for number, inode in descriptors.items():
        with suppress(OSError), _borrowed(number) as connection:  # it is closed again, or not connected
            host, port = connection.getpeername()[:2]
            if connection.getsockname()[:2] in here or (host, port) in peers or (host, ANY_PORT) in peers:
                found[number] = inode
    return found


def shut_down(descriptors: Descriptors) -> None:
    """Shut connections down without closing their descriptors, which are their owner's."""
    for number, inode in descriptors.items():
        with suppress(OSError), _borrowed(number) as connection:
            # gloo ends the process when its listening socket fails.
            if os.fstat(connection.fileno()).st_ino == inode and not _is_listening(connection):
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


def _is_listening(connection: socket.socket) -> bool:
    return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


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
