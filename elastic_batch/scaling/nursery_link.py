"""The owner's side of the nursery: asks for workers, hears of their ends, starts it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from elastic_batch.scaling.nursery import PRELOADED, Birth
from elastic_batch.scaling.processes import end_process, start_python

_CODE = (
    "from elastic_batch.scaling.nursery import serve; serve(int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv[1:])"
)
_GRACE_SECONDS = 2.0


class Parent(Protocol):
    """Who hears what becomes of workers."""

    def started(self, slot: str, pid: int) -> None:
        """The slot has a process."""

    def ended(self, slot: str, pid: int, code: int) -> None:
        """The slot's process has ended."""

    def nursery_lost(self) -> None:
        """The nursery died, and every worker with it."""


class NurseryLink:
    """One nursery, from `start` to `close`.

    Args:
        parent: Hears of workers.
        environ: The nursery's environment, and that of all workers.
        modules: What it imports before the first birth.
    """

    def __init__(self, parent: Parent, environ: Mapping[str, str], modules: Sequence[str] = PRELOADED) -> None:
        self._parent = parent
        self._environ = dict(environ)
        self._modules = modules
        self._socket: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._unread = b""

    async def start(self) -> None:
        """Start the nursery. It may be asked for workers at once, and bears them when it has imported.

        Raises:
            OSError: There can be no further process.
        """
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as unless_started, theirs:
            unless_started.enter_context(ours)
            number = theirs.fileno()
            arguments = [str(number), str(os.getpid()), *self._modules]
            self._process = await start_python(_CODE, arguments, environ=self._environ, keep=[number])
            unless_started.pop_all()
        self._socket, self._unread = ours, b""
        asyncio.get_running_loop().add_reader(ours, self._read)

    def bear(self, birth: Birth, output: int) -> None:
        """Ask for a worker; `Parent.started` follows, or `Parent.nursery_lost`.

        Args:
            birth: What it is.
            output: Descriptor that its outputs go to; the caller may close it afterwards.
        """
        self._send(asdict(birth), [output])

    def signal(self, slot: str, number: signal.Signals) -> None:
        """Send a signal to the slot's process; SIGKILL goes to everything that it has started, too."""
        self._send({"slot": slot, "signal": int(number)}, [])

    async def close(self) -> None:
        """Kill all workers and end the nursery."""
        self._hang_up()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), _GRACE_SECONDS)
            except TimeoutError:  # still importing
                await end_process(self._process, 0.0)
                await self._process.wait()

    def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if self._socket is None:
            return  # lost: its workers are started again with a new one
        data = json.dumps(message).encode() + b"\n"
        try:
            sent = socket.send_fds(self._socket, [data], descriptors) if descriptors else 0
            self._socket.sendall(data[sent:])
        except OSError:  # it died; whoever asks is told when it has done with asking
            asyncio.get_running_loop().call_soon(self._lose)

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._hear(json.loads(line))

    def _hear(self, message: dict[str, Any]) -> None:
        if "started" in message:
            self._parent.started(message["started"], message["pid"])
        else:
            self._parent.ended(message["ended"], message["pid"], message["code"])

    def _lose(self) -> None:
        """It was found dead, by reading or by writing."""
        if self._socket is not None:
            self._hang_up()
            self._parent.nursery_lost()

    def _hang_up(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
