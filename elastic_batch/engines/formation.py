"""The forming of a process group: on a thread of its own, so that nobody has to wait for one that was broken off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from elastic_batch.engines.sockets import (
    Address,
    Descriptors,
    connections_between,
    open_sockets,
    opened_since,
    shut_down,
)

_Made = TypeVar("_Made")


class Formation:
    """The forming of a process group, which another thread may break off."""

    def __init__(self) -> None:
        self._before = open_sockets()
        self._here: Collection[Address] = ()
        self._peers: Collection[Address] = ()
        self._broken_off: Future[None] = Future()

    def abort(self) -> None:
        """End the wait for it, and the connections made so far: the others hear of it by that. Never blocks."""
        with suppress(InvalidStateError):  # once is enough
            self._broken_off.set_result(None)
        shut_down(self.sockets())

    def probe(self) -> None:
        """What is missing while connections are made is missed by who makes them."""

    def expect(self, here: Collection[Address], peers: Collection[Address]) -> None:
        """Say which connections the group will make, before it makes them.

        Args:
            here: Where this worker listens for others.
            peers: Where they listen; may grow until the group is made.
        """
        self._here, self._peers = here, peers

    def sockets(self) -> Descriptors:
        """The group's connections: what was opened since the forming began, and for nothing else."""
        return connections_between(opened_since(self._before), self._here, self._peers)

    @property
    def is_aborted(self) -> bool:
        return self._broken_off.done()

    def run(self, connect: Callable[[], _Made], *, undo: Callable[[_Made], None], timeout: timedelta) -> _Made:
        """Call `connect` on a thread of its own, which is left to itself when the forming is broken off.

        gloo's wait for a peer that has gone before it connected cannot be ended from outside: on the side that
        listens there is no socket to shut down.

        Args:
            connect: Makes the process group.
            undo: Gives back what `connect` has made although the forming was broken off, or too late.
            timeout: How long to wait for it.

        Raises:
            OSError: The forming was broken off, or took too long. Else what `connect` raises.
        """
        made: Future[_Made] = Future()
        either: tuple[Future[Any], ...] = (made, self._broken_off)

        def run() -> None:
            try:
                made.set_result(connect())
            except BaseException as error:
                # Their frames would keep the group, hence its connections.
                error.__context__ = None
                made.set_exception(error.with_traceback(None))

        threading.Thread(target=run, name="elastic-batch forming", daemon=True).start()
        wait(either, timeout.total_seconds(), FIRST_COMPLETED)
        if made.done() and not self.is_aborted:
            return made.result()
        made.add_done_callback(lambda late: undo(late.result()) if late.exception() is None else None)
        if self.is_aborted:
            raise ConnectionAbortedError("the forming was broken off")
        raise TimeoutError(f"not within {timeout.total_seconds():g} s")
