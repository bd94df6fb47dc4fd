"""The WebSocket to the coordinator, on a thread of its own: made again whenever it breaks, never in training's way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import socket
import threading
import time
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from elastic_batch import failpoints
from elastic_batch.errors import InvalidSetting
from elastic_batch.protocol import (
    MAX_MESSAGE_BYTES,
    Abort,
    Beat,
    Bye,
    FromCoordinator,
    FromWorker,
    Hello,
    Refused,
    StoreReply,
    StoreRequest,
    Welcome,
    parse_from_coordinator,
)
from elastic_batch.version import VERSION
from elastic_batch.worker.credentials import Credentials

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.05, 1.0
CLOSE_SECONDS = 2.0
_FAREWELL_SECONDS = 10.0
"""How long a worker that has finished looks for a coordinator that is away: without its word the job seems to go on."""
_PING_SECONDS = 15.0
"""Between two, and for an answer: far longer than a coordinator of thousands, or an interpreter, is ever held up."""
_UNANSWERED_SECONDS = 5.0
"""A coordinator that takes longer to open a connection or to greet is taken for gone."""


class Listener(Protocol):
    """Who the connection works for; all is called on the connection's thread."""

    @property
    def world(self) -> tuple[int, tuple[str, ...]]: ...

    @property
    def is_ending(self) -> bool: ...

    def pending(self) -> list[Any]: ...

    def beat(self) -> Beat: ...

    def hear(self, message: FromCoordinator) -> None: ...

    def fail(self, reason: str) -> None: ...


class Connection:
    """Speaks with the coordinator for a listener.

    Args:
        credentials: Where it is, and who this worker is.
        listener: Hears what it says.

    Attributes:
        name: This worker's name.
        address: Where the other workers reach it, as it last told the coordinator.
        condition: For people: how the connection is.
    """

    def __init__(self, credentials: Credentials, listener: Listener) -> None:
        self.name = credentials.name
        self.address = ""
        self.condition = "not connected"
        self._credentials = credentials
        self._listener = listener
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="elastic-batch session", daemon=True)
        self._socket: ClientConnection | None = None
        self._run_id: str | None = None
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[int, Future[StoreReply]]] = {}
        self._closing = False
        self._main: asyncio.Task[None] | None = None
        self._cut_off_until = 0.0
        self._seen_at = time.monotonic()
        failpoints.on_partition(self.cut_off)

    @property
    def away_seconds(self) -> float:
        """For how long there has been no connection."""
        return 0.0 if self._socket is not None else time.monotonic() - self._seen_at

    def start(self) -> None:
        """Connect, and stay connected until `close`."""
        self._seen_at = time.monotonic()
        self._thread.start()

    def send(self, *messages: FromWorker) -> None:
        """Say something now if there is a connection; the listener repeats what matters on the next one."""
        with contextlib.suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._send_soon, messages)

    def ask(self, generation: int, **fields: Any) -> StoreReply:
        """Ask the store of a generation, and wait for the answer.

        Raises:
            RuntimeError: The generation is over, the connection broke, or the wait took too long.
        """
        request = StoreRequest(request=next(self._numbers), generation=generation, **fields)
        future: Future[StoreReply] = Future()
        self._loop.call_soon_threadsafe(self._ask_soon, request, future)
        try:
            reply = future.result(request.wait_seconds + _UNANSWERED_SECONDS)
        except (CancelledError, TimeoutError):
            raise RuntimeError(f"generation {generation} was withdrawn, or the coordinator is gone") from None
        if reply.error is not None:
            raise RuntimeError(reply.error)
        return reply

    def cut_off(self, seconds: float) -> None:
        """Lose the connection and make no other for some seconds, as if the network were down."""

        def cut() -> None:
            self._cut_off_until = self._loop.time() + seconds
            if self._socket is not None:
                self._socket.transport.abort()

        self._loop.call_soon_threadsafe(cut)

    def close(self, bye: Bye) -> None:
        """Say goodbye and end the thread; one that has finished waits a little for a coordinator that is away."""
        if self._closing or not self._thread.is_alive():
            return
        if bye.reason == "finished":
            self._await_connection(_FAREWELL_SECONDS)
        self._closing = True
        farewell = self._say_bye(bye)
        with contextlib.suppress(RuntimeError, TimeoutError):
            asyncio.run_coroutine_threadsafe(farewell, self._loop).result(CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            farewell.close()  # the loop may have ended by itself before it came to it

    def _await_connection(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._socket is None and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(FIRST_RETRY_SECONDS)

    def _run(self) -> None:
        try:
            self._main = self._loop.create_task(self._stay_connected())
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # the training thread would wait for this one without a word
            logger.exception("the connection to the coordinator failed")
            self._listener.fail(f"the connection to the coordinator failed: {error!r}")
        finally:
            self._loop.close()

    async def _stay_connected(self) -> None:
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                if await self._connect_once():
                    pause = FIRST_RETRY_SECONDS
            except InvalidSetting as error:
                self._listener.fail(str(error))
                return
            except InvalidStatus as error:
                # Later on it may be another service that has the port while the coordinator is away.
                if error.response.status_code in (401, 403) and self._run_id is None:
                    self._listener.fail(_refusal(error, self._credentials))
                    return
                self.condition = f"answering with status {error.response.status_code}"
            except (OSError, TimeoutError, ConnectionClosed, InvalidHandshake) as error:
                self.condition = f"out of reach ({error or type(error).__name__})"
            if self._socket is not None and not self._listener.is_ending:
                logger.warning("the connection to the coordinator broke; training goes on")
            self._drop()
            cut_off = self._cut_off_until - self._loop.time()
            await asyncio.sleep(max(cut_off, pause * random.uniform(0.8, 1.0)))
            pause = min(2 * pause, LAST_RETRY_SECONDS)

    async def _connect_once(self) -> bool:
        """One connection's life. Returns whether it was welcome."""
        door = self._credentials.door()
        headers = {"Authorization": f"Bearer {door.token}"}
        async with connect(
            door.websocket_url,
            additional_headers=headers,
            ssl=door.tls,
            open_timeout=_UNANSWERED_SECONDS,
            close_timeout=CLOSE_SECONDS,
            # Beats are ours, and nobody answers them: this finds the coordinator that hangs while its socket stands.
            ping_interval=_PING_SECONDS,
            ping_timeout=_PING_SECONDS,
            max_size=MAX_MESSAGE_BYTES,
            compression=None,
            proxy=None,
        ) as connection:
            # Else a beat that a cut cable swallowed is sent again ever more rarely, for a quarter of an hour.
            wire: socket.socket = connection.transport.get_extra_info("socket")
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * _UNANSWERED_SECONDS))
            await connection.send(self._hello(connection).model_dump_json())
            async with asyncio.timeout(_UNANSWERED_SECONDS):
                greeting = parse_from_coordinator(await connection.recv())
            self._listener.hear(greeting)
            if isinstance(greeting, Refused):
                raise asyncio.CancelledError
            if not isinstance(greeting, Welcome):
                return False
            self._run_id, self._socket, self.condition = greeting.run_id, connection, "connected"
            for message in self._listener.pending():
                await connection.send(message.model_dump_json())
            beats = asyncio.create_task(self._beat(connection, greeting.beat_seconds))
            try:
                async for text in connection:
                    self._hear(text)
            finally:
                beats.cancel()
            return True

    def _hello(self, connection: ClientConnection) -> Hello:
        generation, members = self._listener.world
        self.address = self._credentials.address or connection.local_address[0]
        return Hello(
            package=VERSION,
            worker=self.name,
            slot=self._credentials.slot,
            host=socket.gethostname(),
            address=self.address,
            pid=os.getpid(),
            generation=generation,
            members=members,
            run_id=self._run_id,
        )

    async def _beat(self, connection: ClientConnection, seconds: float) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await connection.send(self._listener.beat().model_dump_json())
                await asyncio.sleep(seconds)

    def _hear(self, text: str | bytes) -> None:
        message = parse_from_coordinator(text)
        if isinstance(message, StoreReply):
            _, future = self._asked.pop(message.request, (0, None))
            if future is not None and not future.done():
                future.set_result(message)
            return
        if isinstance(message, Abort):
            self._withdraw(message.generation)
        self._listener.hear(message)

    def _send_soon(self, messages: tuple[FromWorker, ...]) -> None:
        if self._socket is not None:
            self._loop.create_task(self._send(self._socket, messages))

    async def _send(self, connection: ClientConnection, messages: tuple[FromWorker, ...]) -> None:
        with contextlib.suppress(ConnectionClosed):
            for message in messages:
                await connection.send(message.model_dump_json())

    def _ask_soon(self, request: StoreRequest, future: Future[StoreReply]) -> None:
        if self._socket is None:
            future.cancel()
            return
        self._asked[request.request] = (request.generation, future)
        self._loop.create_task(self._send(self._socket, (request,)))

    def _withdraw(self, generation: int) -> None:
        """Let every question to the store of a generation that is over raise."""
        for number, (asked_of, future) in list(self._asked.items()):
            if asked_of <= generation:
                del self._asked[number]
                future.cancel()

    def _drop(self) -> None:
        if self._socket is not None:
            self._seen_at = time.monotonic()
            self._socket = None
        for _, future in self._asked.values():
            future.cancel()
        self._asked.clear()

    async def _say_bye(self, bye: Bye) -> None:
        if self._socket is not None:
            with contextlib.suppress(ConnectionClosed, TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS / 2):
                    await self._socket.send(bye.model_dump_json())
                    await self._socket.close()
        assert self._main is not None
        self._main.cancel()


def _refusal(error: InvalidStatus, credentials: Credentials) -> str:
    text = bytes(error.response.body or b"").decode(errors="replace").strip()
    source = credentials.token_file or credentials.run_dir
    return f"the coordinator refused this worker: {text or error}. Its token came from {source}"
