"""The workers' connections: who is connected, and a bounded queue of what each has still to hear."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable

from starlette.websockets import WebSocket, WebSocketDisconnect

from elastic_batch.protocol import FromCoordinator, Hello

MAX_QUEUED_BYTES = 16 << 20
"""What one worker may leave unread before it is cut off."""
CLOSE_SECONDS = 2.0
"""How long a closing message may take to get out."""
_REASON_BYTES = 120
"""A WebSocket's closing reason has room for 123."""


class Connection:
    """One worker's WebSocket. `send` and `close` return at once; `pump` does the work.

    Attributes:
        hello: What the worker said first; None until then.
        position: Samples committed, as it last said.
    """

    def __init__(self) -> None:
        self.hello: Hello | None = None
        self.position = 0
        self._queue: deque[str] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._closing: tuple[int, str] | None = None

    @property
    def is_closing(self) -> bool:
        """Whether nothing more is to be heard from it."""
        return self._closing is not None

    def send(self, text: str) -> None:
        """Queue a message; a worker that does not read is cut off."""
        if self._closing is not None:
            return
        self._queue.append(text)
        self._queued_bytes += len(text)
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self._queue.clear()
            self.close(1008, "this worker does not read what it is told")
        self._wake.set()

    def close(self, code: int, reason: str) -> None:
        """Close the connection after what is queued."""
        if self._closing is None:
            self._closing = (code, reason)
            self._wake.set()

    async def pump(self, websocket: WebSocket) -> None:
        """Send what is queued, until the connection is closed by either side."""
        with contextlib.suppress(WebSocketDisconnect, TimeoutError, RuntimeError):
            while self._closing is None:
                await self._wake.wait()
                self._wake.clear()
                while self._queue and self._closing is None:
                    await self._send_first(websocket)
            async with asyncio.timeout(CLOSE_SECONDS):
                while self._queue:
                    await self._send_first(websocket)
        if self._closing is not None:
            code, reason = self._closing
            with contextlib.suppress(WebSocketDisconnect, TimeoutError, RuntimeError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await websocket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))

    async def _send_first(self, websocket: WebSocket) -> None:
        text = self._queue.popleft()
        self._queued_bytes -= len(text)
        await websocket.send_text(text)


class Connections:
    """The living connections by worker."""

    def __init__(self) -> None:
        self._by_name: dict[str, Connection] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def names(self) -> list[str]:
        """The connected workers."""
        return list(self._by_name)

    def get(self, name: str) -> Connection | None:
        """A worker's connection, if it has one."""
        return self._by_name.get(name)

    def add(self, name: str, connection: Connection) -> None:
        """A worker connected; an older connection of the same name is closed."""
        if (old := self._by_name.get(name)) is not None:
            old.close(1008, "the worker connected again")
        self._by_name[name] = connection

    def remove(self, name: str, connection: Connection) -> bool:
        """A connection ended. Returns whether it was the worker's newest."""
        if self._by_name.get(name) is not connection:
            return False
        del self._by_name[name]
        return True

    def cut(self, name: str, code: int, reason: str) -> None:
        """Close a worker's connection and forget it at once."""
        if (connection := self._by_name.pop(name, None)) is not None:
            connection.close(code, reason)

    def tell(self, names: Iterable[str], message: FromCoordinator) -> None:
        """Send one message to those of the workers that are connected."""
        text = message.model_dump_json()
        for name in names:
            if (connection := self._by_name.get(name)) is not None:
                connection.send(text)
