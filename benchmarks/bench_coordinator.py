"""How fast a decision reaches thousands of workers, and what they cost: real sockets, workers that only speak.

Prints one JSON object. The workers live in another process than the coordinator, on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from elastic_batch.coordinator.announcement import Announcement, read_announcement
from elastic_batch.coordinator.listening import allow_many_connections
from elastic_batch.protocol import MAX_MESSAGE_BYTES, PATH, Beat, Entered, Hello, Ready
from elastic_batch.version import VERSION

_PATIENCE_SECONDS = 120.0
_CONNECTING_AT_ONCE = 100


class Crowd:
    """Many workers on one event loop, which note when each kind of message came."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.heard: dict[str, list[float]] = {}
        self.sockets: list[ClientConnection] = []
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self, door: Announcement) -> None:
        limit = asyncio.Semaphore(_CONNECTING_AT_ONCE)
        url, headers = "ws" + door.url.removeprefix("http") + PATH, {"Authorization": f"Bearer {door.token}"}

        async def one(index: int) -> ClientConnection:
            async with limit:
                socket = await connect(
                    url,
                    additional_headers=headers,
                    compression=None,
                    proxy=None,
                    ping_interval=None,
                    max_size=MAX_MESSAGE_BYTES,
                    open_timeout=60,
                )
                name = f"node-{index // 8:04d}-{index % 8}"
                hello = Hello(package=VERSION, worker=name, slot=name, host="h", address=f"10.0.0.{index % 250}", pid=1)
                await socket.send(hello.model_dump_json())
                return socket

        self.sockets = await asyncio.gather(*(one(index) for index in range(self.number)))
        for socket in self.sockets:
            self._tasks += [asyncio.create_task(self._listen(socket)), asyncio.create_task(self._beat(socket))]

    async def say(self, message: Any) -> None:
        text = message.model_dump_json()
        for socket in self.sockets:
            await socket.send(text)

    async def hear(self, kind: str) -> float:
        """When the last worker heard a message of a kind."""
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while len(self.heard.get(kind, ())) < self.number:
                self._changed.clear()
                await self._changed.wait()
        return max(self.heard.pop(kind))

    async def _listen(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for text in socket:
                kind = str(text[9:20]).partition('"')[0]  # {"kind":"form",...
                self.heard.setdefault(kind, []).append(time.monotonic())
                self._changed.set()

    async def _beat(self, socket: ClientConnection) -> None:
        text = Beat(update=1, position=1, stage="compute", num_micro_batches=self.number).model_dump_json()
        with contextlib.suppress(ConnectionClosed):
            while True:
                await asyncio.sleep(1)
                await socket.send(text)


async def measure(number: int, run_dir: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Form a world of all workers, then end it."""
    door = await _until(lambda: read_announcement(run_dir))
    crowd = Crowd(number)
    started = time.monotonic()
    await crowd.connect(door)
    connected = time.monotonic()
    await crowd.hear("welcome")
    result: dict[str, Any] = {"workers": number, "connect_seconds": connected - started}
    before = _cpu_seconds(process.pid)
    await asyncio.sleep(5)
    result["idle_cpu_share"] = (_cpu_seconds(process.pid) - before) / 5
    await crowd.say(Ready(num_micro_batches=number))
    said = time.monotonic()
    formed = await crowd.hear("form")
    result["form_seconds_after_last_ready"] = formed - said
    await crowd.say(Entered(generation=1))
    async with httpx.AsyncClient(base_url=door.url, headers={"Authorization": f"Bearer {door.token}"}) as http:
        while (await http.get("/status", timeout=60)).json()["phase"] != "running":
            await asyncio.sleep(0.1)
        before = _cpu_seconds(process.pid)
        await asyncio.sleep(5)
        result["world_cpu_share"] = (_cpu_seconds(process.pid) - before) / 5
        asked = time.monotonic()
        await http.post("/stop", json={"reason": "measured"}, timeout=60)
        result["stop_seconds"] = await crowd.hear("stop") - asked
        lost = time.monotonic()
        crowd.number -= 1
        crowd.sockets[-1].transport.abort()
        result["abort_seconds_after_a_loss"] = await crowd.hear("abort") - lost
    result["coordinator_megabytes"] = _peak_megabytes(process.pid)
    return result


async def _until(find: Callable[[], Announcement | None]) -> Announcement:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while (found := find()) is None:
            await asyncio.sleep(0.05)
    return found


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _peak_megabytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=5000)
    number = parser.parse_args().workers
    allow_many_connections()
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "elastic_batch", "coordinator", "--run-dir", directory]
        command += ["--min-workers", str(number), "--form-seconds", "300", "--eviction-seconds", "60"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                print(json.dumps(asyncio.run(measure(number, Path(directory), process)), indent=2))
            finally:
                process.kill()


if __name__ == "__main__":
    main()
