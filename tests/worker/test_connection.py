"""A worker's connection: what ends it, and what it tries again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from elastic_batch.protocol import Beat, Bye, Entered, FromCoordinator, Leaving, Ready, Welcome
from elastic_batch.worker import connection as connection_module
from elastic_batch.worker.connection import Connection
from elastic_batch.worker.credentials import Credentials

PATIENCE_SECONDS = 10.0


class Listener:
    """Notes what it hears, and why a connection cannot be made."""

    world: tuple[int, tuple[str, ...]] = (-1, ())
    is_ending = False

    def __init__(self) -> None:
        self.welcomes = 0
        self.failure: str | None = None
        self.changed = threading.Condition()

    def pending(self) -> list[Ready | Leaving | Entered]:
        return []

    def beat(self) -> Beat:
        return Beat(update=0, position=0, stage="wait", num_micro_batches=1)

    def hear(self, message: FromCoordinator) -> None:
        with self.changed:
            self.welcomes += isinstance(message, Welcome)
            self.changed.notify_all()

    def fail(self, reason: str) -> None:
        with self.changed:
            self.failure = reason
            self.changed.notify_all()

    def wait_for(self, num_welcomes: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.welcomes >= num_welcomes or self.failure, PATIENCE_SECONDS)


@contextmanager
def coordinator(answers: list[HTTPStatus | None], said: list[str] | None = None) -> Iterator[str]:
    """A coordinator that answers connections as told, and welcomes where that is None; gives its address.

    It drops whom it has welcomed, unless it is to note what they say.
    """

    def decide(_: ServerConnection, __: Request) -> Response | None:
        status = answers.pop(0) if answers else None
        return None if status is None else _.respond(status, "no\n")

    async def welcome(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send(Welcome(run_id="r", beat_seconds=9, generation=-1).model_dump_json())
        if said is not None:
            said.extend([str(text) async for text in connection])
        await connection.close()

    started: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = []
    ready = threading.Event()

    async def run() -> None:
        async with serve(welcome, "127.0.0.1", 0, process_request=decide) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            over = asyncio.Event()
            started.append((f"http://127.0.0.1:{port}", asyncio.get_running_loop(), over))
            ready.set()
            await over.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    ready.wait(PATIENCE_SECONDS)
    address, loop, over = started[0]
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(PATIENCE_SECONDS)


def connect(url: str, folder: Path, listener: Listener, **fields: Any) -> Connection:
    token = folder / "token"
    token.write_text("secret")
    given: dict[str, Any] = {
        "url": url,
        "token_file": token,
        "run_dir": None,
        "name": "w",
        "slot": "w",
        "address": None,
    }
    connection = Connection(Credentials(**{**given, **fields}), listener)
    connection.start()
    return connection


@pytest.mark.parametrize("status", [HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN])
def test_a_refusal_is_final_for_a_worker_that_was_never_welcome(tmp_path: Path, status: HTTPStatus) -> None:
    listener = Listener()
    with coordinator([status]) as url:
        connection = connect(url, tmp_path, listener)
        listener.wait_for(1)
        connection.close(Bye(reason="left"))
    assert "the coordinator refused this worker: no" in (listener.failure or "")


def test_a_refusal_passes_for_a_worker_that_was_welcome(tmp_path: Path) -> None:
    listener = Listener()
    with coordinator([None, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, None]) as url:
        connection = connect(url, tmp_path, listener)
        listener.wait_for(2)
        connection.close(Bye(reason="left"))
    assert listener.welcomes >= 2
    assert listener.failure is None


def test_a_coordinator_that_is_away_hears_that_a_worker_has_finished(tmp_path: Path) -> None:
    said: list[str] = []
    with coordinator([HTTPStatus.SERVICE_UNAVAILABLE] * 3, said) as url:
        connection = connect(url, tmp_path, Listener())
        connection.close(Bye(reason="finished"))
    assert any('"finished"' in text for text in said)


def test_nobody_waits_for_a_connection_whose_thread_failed(tmp_path: Path) -> None:
    listener = Listener()
    with coordinator([]) as url:
        connection = connect(url, tmp_path, listener, name="w" * 1000)
        listener.wait_for(1)
        connection.close(Bye(reason="left"))
    assert "the connection to the coordinator failed" in (listener.failure or "")


def test_an_announcement_that_cannot_be_read_at_the_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = Credentials(url=None, token_file=None, run_dir=tmp_path, name="w", slot="w", address=None)

    def stale(_: Path) -> bytes:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(OSError, match="Stale"):
        credentials.door()
    assert credentials.completed_end() == -1


def test_a_coordinator_that_hangs_is_away_though_its_socket_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_PING_SECONDS", 0.1)
    listener = Listener()

    def hang(*_: object) -> None:
        """Read nothing any more, as a process does that is stopped."""

    with coordinator([None, HTTPStatus.SERVICE_UNAVAILABLE], []) as url:
        connection = connect(url, tmp_path, listener)
        listener.wait_for(1)
        monkeypatch.setattr(ServerConnection, "data_received", hang)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while connection.away_seconds == 0.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.undo()
        listener.wait_for(2)
        connection.close(Bye(reason="left"))
    assert listener.welcomes == 2
