"""How fast a decision reaches thousands of workers, and what they cost: real sockets, workers that only speak.

Prints one JSON object. The workers live in another process than the coordinator, on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from elastic_batch.coordinator.announcement import Announcement, read_announcement
from elastic_batch.coordinator.listening import allow_many_connections
from elastic_batch.protocol import PATH, Beat, Entered, Hello, Message, Ready
from elastic_batch.version import VERSION

_PATIENCE_SECONDS = 120.0
_CONNECTING_AT_ONCE = 100


class Voice(asyncio.Protocol):
    """One worker's connection, as cheap as can be: it reads no more of a message than its kind."""

    def __init__(self, crowd: Crowd, name: str) -> None:
        self._crowd, self._name = crowd, name
        self._unread = b""
        self._to_skip = 0
        self._kind = ""
        self._is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._crowd.handshake)

    def data_received(self, data: bytes) -> None:
        if self._to_skip > len(data):
            self._to_skip -= len(data)
            return
        if self._to_skip:
            self._note()
        self._unread += data[self._to_skip :]
        self._to_skip = 0
        if not self._is_open:
            head, end, self._unread = self._unread.partition(b"\r\n\r\n")
            assert not end or head.startswith(b"HTTP/1.1 101"), head
            if not end:
                self._unread = head
                return
            self._is_open = True
            hello = Hello(package=VERSION, worker=self._name, slot=self._name, host="h", address="10.0.0.1", pid=1)
            self.say(hello.model_dump_json().encode())
        self._read_frames()

    def say(self, text: bytes) -> None:
        """Send a text frame, masked with zeros."""
        size = len(text)
        head = struct.pack("!BB", 0x81, 0x80 | size) if size < 126 else struct.pack("!BBH", 0x81, 0xFE, size)
        self.transport.write(head + bytes(4) + text)

    def _note(self) -> None:
        self._crowd.note(self._kind)
        if self._kind == "probe":  # a real worker's connections to the one that died have ended too
            self.say(self._crowd.complaint)

    def _read_frames(self) -> None:
        """Note the kind of each message, {"kind":"form",..., when its last byte is here; a long one is not kept."""
        while len(self._unread) >= 2:
            size, start = self._unread[1] & 0x7F, 2
            if size >= 126:
                start = 4 if size == 126 else 10
                if len(self._unread) < start:
                    return
                size = int.from_bytes(self._unread[2:start], "big")
            if len(self._unread) < min(start + size, start + 24):
                return
            self._kind = self._unread[start + 9 : start + 24].partition(b'"')[0].decode()
            missing = start + size - len(self._unread)
            if missing <= 0 and self._unread[0] & 0x0F == 1:
                self._note()
            self._to_skip, self._unread = max(0, missing), self._unread[start + size :]


class Crowd:
    """Many workers on one event loop, which note when each kind of message came.

    Args:
        number: Of workers.
        door: Where the coordinator is.
    """

    def __init__(self, number: int, door: Announcement) -> None:
        self.number = number
        where = urlsplit(door.url)
        self._host, self._port = where.hostname or "", where.port or 0
        key = b64encode(bytes(16)).decode()
        self.handshake = (
            f"GET {PATH} HTTP/1.1\r\nHost: {where.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {door.token}\r\n\r\n"
        ).encode()
        self.complaint = Ready(after=1, broken=True, num_micro_batches=number).model_dump_json().encode()
        self.voices: list[Voice] = []
        self._heard: Counter[str] = Counter()
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._changed = asyncio.Event()

    async def connect(self) -> None:
        """Connect all, and beat from now on."""
        loop, limit = asyncio.get_running_loop(), asyncio.Semaphore(_CONNECTING_AT_ONCE)

        async def one(index: int) -> Voice:
            async with limit:
                name = f"node-{index // 8:04d}-{index % 8}"
                _, voice = await loop.create_connection(lambda: Voice(self, name), self._host, self._port)
                return voice

        self.voices = await asyncio.gather(*(one(index) for index in range(self.number)))

    async def beat(self) -> None:
        """Let each worker beat once a second, evenly spread."""
        text = Beat(update=1, position=1, stage="compute", num_micro_batches=self.number).model_dump_json().encode()
        while True:
            for part in range(100):
                for voice in self.voices[part::100]:
                    voice.say(text)
                await asyncio.sleep(0.01)

    def say(self, message: Message) -> None:
        """Let all say the same."""
        text = message.model_dump_json().encode()
        for voice in self.voices:
            voice.say(text)

    def note(self, kind: str) -> None:
        """A worker heard a message."""
        self._heard[kind] += 1
        self._last[kind] = time.monotonic()
        self._first.setdefault(kind, self._last[kind])
        self._changed.set()

    async def hear(self, kind: str) -> float:
        """When the last worker heard a message of a kind."""
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while self._heard[kind] < self.number:
                self._changed.clear()
                await self._changed.wait()
        return self._last[kind]

    def spread(self, kind: str) -> float:
        """Seconds from the first worker that heard a message of a kind to the last."""
        return self._last[kind] - self._first[kind]


async def measure(number: int, run_dir: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Form a world of all workers, then end it."""
    door = await _until(lambda: read_announcement(run_dir))
    crowd = Crowd(number, door)
    started = time.monotonic()
    await crowd.connect()
    result: dict[str, Any] = {"workers": number, "connect_seconds": await crowd.hear("welcome") - started}
    beating = asyncio.create_task(crowd.beat())
    before = _cpu_seconds(process.pid)
    await asyncio.sleep(5)
    result["idle_cpu_share"] = (_cpu_seconds(process.pid) - before) / 5
    crowd.say(Ready(num_micro_batches=number))
    said = time.monotonic()
    formed = await crowd.hear("form")
    result["form_seconds_after_last_ready"] = formed - said
    crowd.say(Entered(generation=1))
    async with httpx.AsyncClient(base_url=door.url, headers={"Authorization": f"Bearer {door.token}"}) as http:
        while (await http.get("/status", timeout=60)).json()["phase"] != "running":
            await asyncio.sleep(0.1)
        before = _cpu_seconds(process.pid)
        await asyncio.sleep(5)
        result["world_cpu_share"] = (_cpu_seconds(process.pid) - before) / 5
        asked, before = time.monotonic(), _cpu_seconds(process.pid)
        await http.post("/stop", json={"reason": "measured"}, timeout=60)
        result["stop_seconds"] = await crowd.hear("stop") - asked
        result["stop_cpu_seconds"] = _cpu_seconds(process.pid) - before
        lost = time.monotonic()
        crowd.number -= 1
        crowd.voices.pop().transport.abort()
        result["abort_seconds_after_a_loss"] = await crowd.hear("abort") - lost
        # Two decisions: ask the others whether they miss it too, and, as soon as one of them does, end the world.
        result["probe_spread_seconds"], result["abort_spread_seconds"] = crowd.spread("probe"), crowd.spread("abort")
    beating.cancel()
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
