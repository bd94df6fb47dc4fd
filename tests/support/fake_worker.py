"""A worker without training: it speaks the protocol over a real WebSocket."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection, connect

from elastic_batch.protocol import (
    PATH,
    Beat,
    Bye,
    Entered,
    Form,
    FromCoordinator,
    FromWorker,
    Hello,
    Message,
    Ready,
    StoreReply,
    StoreRequest,
    Welcome,
    parse_from_coordinator,
)
from elastic_batch.version import VERSION

Heard = TypeVar("Heard", bound=Message)
PATIENCE_SECONDS = 10.0


class FakeWorker:
    """One connection of a worker, after its `Hello`.

    Args:
        socket: The WebSocket.
        name: The worker's name.
    """

    def __init__(self, socket: ClientConnection, name: str) -> None:
        self.socket, self.name = socket, name
        self.unheard: list[FromCoordinator] = []
        self._requests = 0

    async def say(self, message: FromWorker) -> None:
        await self.socket.send(message.model_dump_json())

    async def hear(self, kind: type[Heard]) -> Heard:
        """The next message of a kind; others are kept for later."""
        for message in self.unheard:
            if isinstance(message, kind):
                self.unheard.remove(message)
                return message
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                message = parse_from_coordinator(await self.socket.recv())
                if isinstance(message, kind):
                    return message
                self.unheard.append(message)

    async def ready(self, after: int = -1, *, num_micro_batches: int = 8, **fields: Any) -> None:
        await self.say(Ready(after=after, num_micro_batches=num_micro_batches, **fields))

    async def beat(self, **fields: Any) -> None:
        given = {"update": 1, "position": 8, "stage": "compute", "num_micro_batches": 8}
        await self.say(Beat(**{**given, **fields}))

    async def enter(self) -> Form:
        """Take part in the next world."""
        form = await self.hear(Form)
        await self.say(Entered(generation=form.generation))
        return form

    async def bye(self, reason: Any) -> None:
        await self.say(Bye(reason=reason))
        await self.socket.wait_closed()

    async def ask(self, generation: int, **fields: Any) -> StoreReply:
        self._requests += 1
        await self.say(StoreRequest(request=self._requests, generation=generation, **fields))
        return await self.hear(StoreReply)


@asynccontextmanager
async def connected(run_dir: Path, name: str, **fields: Any) -> AsyncIterator[FakeWorker]:
    """A worker that was welcomed by the coordinator of a run directory."""
    async with greeted(run_dir, name, **fields) as worker:
        await worker.hear(Welcome)
        yield worker


@asynccontextmanager
async def greeted(run_dir: Path, name: str, **fields: Any) -> AsyncIterator[FakeWorker]:
    """A worker that has said its `Hello`."""
    door = json.loads((run_dir / "coordinator.json").read_bytes())
    tls = ssl.create_default_context(cafile=door["tls_cert"]) if door["tls_cert"] else None
    headers = {"Authorization": f"Bearer {door['token']}"}
    url = "ws" + door["url"].removeprefix("http") + PATH
    async with connect(url, additional_headers=headers, ssl=tls, compression=None, proxy=None) as socket:
        worker = FakeWorker(socket, name)
        given = {"package": VERSION, "worker": name, "slot": name, "host": "here", "address": "127.0.0.1", "pid": 1}
        await worker.say(Hello(**{**given, **fields}))
        yield worker
