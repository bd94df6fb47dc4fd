"""Queues of messages to workers: bounded, in order, never in the loop's way."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.websockets import WebSocket

from elastic_batch.coordinator.connections import MAX_QUEUED_BYTES, Connection, Connections
from elastic_batch.protocol import Leave


class Wire:
    """The server's side of a WebSocket that takes messages when it is told to."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.writable = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(self, message: Any) -> None:
        await self.writable.wait()
        self.sent.append(message)

    async def open(self) -> WebSocket:
        websocket = WebSocket({"type": "websocket"}, self.receive, self.send)
        self.writable.set()
        await websocket.accept()
        self.sent.clear()
        return websocket


def test_messages_leave_in_order_and_the_closing_reason_comes_last() -> None:
    async def scenario() -> None:
        wire, connection = Wire(), Connection()
        websocket = await wire.open()
        connection.send("1")
        connection.send("2")
        connection.close(4000, "é" * 100)
        connection.send("too late")
        await connection.pump(websocket)
        assert [message.get("text") for message in wire.sent[:-1]] == ["1", "2"]
        assert wire.sent[-1]["code"] == 4000
        assert len(wire.sent[-1]["reason"].encode()) <= 123

    asyncio.run(scenario())


def test_a_worker_that_does_not_read_is_cut_off() -> None:
    async def scenario() -> None:
        wire, connection = Wire(), Connection()
        websocket = await wire.open()
        wire.writable.clear()
        pump = asyncio.create_task(connection.pump(websocket))
        for _ in range(MAX_QUEUED_BYTES // (1 << 20) + 1):
            connection.send("x" * (1 << 20))
        assert connection.is_closing
        wire.writable.set()
        await pump
        assert (wire.sent[-1]["code"], len(wire.sent)) == (1008, 1)

    asyncio.run(scenario())


def test_a_worker_that_connects_again_is_told_on_its_new_connection_only() -> None:
    async def scenario() -> None:
        connections, old, new = Connections(), Connection(), Connection()
        connections.add("a", old)
        connections.add("a", new)
        assert old.is_closing
        assert not connections.remove("a", old)
        wire = Wire()
        websocket = await wire.open()
        connections.tell(["a", "unknown"], Leave(reason="r"))
        connections.cut("a", 4000, "gone")
        await new.pump(websocket)
        assert "leave" in wire.sent[0]["text"]
        assert (len(connections), connections.get("a"), connections.names()) == (0, None, [])

    asyncio.run(scenario())
