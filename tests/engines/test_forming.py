"""Nobody waits for a process group that cannot come about, and what is late of it is given back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.leaks import Holdings
from support.short_lives import CONNECTS, LISTENS, SIZE, die_before_connecting, form
from support.worlds import warm_context
from torch._C._distributed_c10d import FileStore

from elastic_batch.engines import DistributedEngine, Formation, distributed
from elastic_batch.engines.distributed import _gloo_device
from elastic_batch.engines.meeting import MeetingStore
from elastic_batch.errors import WorldBroken

SOON = timedelta(seconds=0.2)
LONG = timedelta(seconds=30)


class Made:
    """What a forming makes; tells where, and whether it was given back."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.is_undone = threading.Event()

    def undo(self) -> None:
        self.is_undone.set()


def _threads() -> int:
    return sum(thread.name == "elastic-batch forming" for thread in threading.enumerate())


def _await(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def meeting_of_a_dead_fellow(tmp_path: Path) -> Path:
    """A file in which a worker has told everything before it died."""
    meeting = tmp_path / "store"
    fellow = warm_context().Process(target=die_before_connecting, args=(meeting,))
    fellow.start()
    fellow.join(30)
    assert fellow.exitcode == -9
    return meeting


def _form_here(meeting: Path, formations: Sequence[Formation] | None = None) -> list[DistributedEngine]:
    """A world of two, both in this process."""
    formations = formations or [Formation() for _ in range(SIZE)]
    stores = [FileStore(str(meeting), SIZE) for _ in range(SIZE)]
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(form, stores, formations, range(SIZE), (LISTENS, CONNECTS), (30, 30)))


def _form_and_leave(meeting: Path) -> None:
    for engine in _form_here(meeting):
        engine.close()


def test_a_worker_whose_fellow_died_before_it_connected_comes_out_at_once(
    meeting_of_a_dead_fellow: Path, tmp_path: Path
) -> None:
    _form_and_leave(tmp_path / "warm up")
    before = Holdings.of(os.getpid())
    formation = Formation()
    at: list[float] = []

    def abort() -> None:
        at.append(time.monotonic())
        formation.abort()

    threading.Timer(0.3, abort).start()
    with pytest.raises(WorldBroken, match="broken off"):
        form(FileStore(str(meeting_of_a_dead_fellow), SIZE), formation, 0, LISTENS, 3)
    assert time.monotonic() - at[0] < 0.5
    since = time.monotonic()
    _form_and_leave(tmp_path / "next")
    assert time.monotonic() - since < 1
    assert _threads() == 1, "the forming that was left to itself is over already: this test shows nothing"
    _await(lambda: _threads() == 0, 4)
    _gloo_device.cache_clear()
    _form_and_leave(tmp_path / "last")
    _await(lambda: Holdings.of(os.getpid()).threads <= before.threads, 1)
    _await(lambda: Holdings.of(os.getpid()).descriptors <= before.descriptors, 1)


def test_nobody_waits_longer_than_the_forming_may_take(meeting_of_a_dead_fellow: Path) -> None:
    since = time.monotonic()
    with pytest.raises(WorldBroken):
        form(FileStore(str(meeting_of_a_dead_fellow), SIZE), Formation(), 0, LISTENS, 1)
    assert time.monotonic() - since < 2
    _await(lambda: _threads() == 0, 2)


def test_a_process_ends_well_while_a_forming_is_stuck(meeting_of_a_dead_fellow: Path) -> None:
    since = time.monotonic()
    command = [sys.executable, "-m", "support.short_lives", str(meeting_of_a_dead_fellow)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "broken off" in ended.stdout
    assert time.monotonic() - since < 25


def test_where_a_failed_world_was_to_meet_the_next_one_does_not(tmp_path: Path) -> None:
    _gloo_device(LISTENS)
    formation = Formation()
    formation.abort()
    with pytest.raises(WorldBroken):
        form(FileStore(str(tmp_path / "store"), SIZE), formation, 0, LISTENS, 1)
    assert _gloo_device.cache_info().currsize == 0


def test_only_a_world_s_own_connections_break_it_or_end_with_it(tmp_path: Path) -> None:
    formations = [Formation() for _ in range(SIZE)]
    elsewhere = socket.create_server(("127.0.0.1", 0))  # a tracker, or this worker's metrics
    scrape, upload = (socket.create_connection(elsewhere.getsockname()) for _ in range(2))
    engines = _form_here(tmp_path / "store", formations)
    scrape.close()
    for engine in engines:
        engine.probe()
        engine.check()
    engines[0].abort()
    engines[1].probe()
    with pytest.raises(WorldBroken):
        engines[1].check()
    scraped, received = (elsewhere.accept()[0] for _ in range(2))
    upload.send(b"x")
    assert received.recv(1) == b"x"
    for engine in engines:
        engine.close()
    for each in (elsewhere, upload, scraped, received):
        each.close()


def test_what_was_made_is_returned() -> None:
    made = Formation().run(Made, undo=Made.undo, timeout=LONG)
    assert made.thread is not threading.current_thread()
    assert not made.is_undone.is_set()


def test_what_went_wrong_is_raised_without_what_it_came_from() -> None:
    def connect() -> Made:
        try:
            raise OSError("the cause")
        except OSError:
            raise RuntimeError("no route") from None

    with pytest.raises(RuntimeError, match="no route") as raised:
        Formation().run(connect, undo=Made.undo, timeout=LONG)
    assert raised.value.__context__ is None
    assert "connect" not in {entry.name for entry in raised.traceback}


@pytest.mark.parametrize("end", ["aborted", "too late"])
def test_what_comes_after_the_end_is_given_back(end: str) -> None:
    formation, go_on, made = Formation(), threading.Event(), list[Made]()

    def connect() -> Made:
        go_on.wait(30)
        made.append(Made())
        return made[0]

    if end == "aborted":
        threading.Timer(0.1, formation.abort).start()
    with pytest.raises(OSError, match="broken off" if end == "aborted" else r"not within 0\.2 s"):
        formation.run(connect, undo=Made.undo, timeout=LONG if end == "aborted" else SOON)
    go_on.set()
    _await(lambda: bool(made) and made[0].is_undone.is_set(), 5)


def test_what_is_made_just_when_the_forming_is_broken_off_is_given_back() -> None:
    formation, made = Formation(), Made()

    def connect() -> Made:
        formation.abort()
        return made

    with pytest.raises(OSError, match="broken off"):
        formation.run(connect, undo=Made.undo, timeout=LONG)
    _await(made.is_undone.is_set, 5)


def test_workers_hear_where_the_others_listen_and_what_they_say(tmp_path: Path) -> None:
    addresses = [("127.0.0.1", 1), ("::1", 2)]
    stores = [MeetingStore(FileStore(str(tmp_path / "store"), SIZE), [address]) for address in addresses]
    with ThreadPoolExecutor(SIZE) as pool:
        list(pool.map(MeetingStore.introduce, stores, range(SIZE), (SIZE, SIZE)))
    assert [store.peers for store in stores] == [{addresses[1]}, {addresses[0]}]
    stores[0].set("key", b"a\nb\0c")
    stores[1].wait(["key"], LONG)
    assert stores[1].check(["key"])
    assert stores[1].get("key") == b"a\nb\0c"


class Group:
    """A group of two that cannot reduce."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce(self, *_: object) -> None:
        raise RuntimeError("Connection reset by peer")


def test_a_group_that_cannot_reduce_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = []
    monkeypatch.setattr(distributed, "_gloo_group", lambda *_: Group())
    monkeypatch.setattr(DistributedEngine, "abort", lambda engine: ended.append("aborted"))
    monkeypatch.setattr(DistributedEngine, "close", lambda engine: ended.append("closed"))
    store = FileStore(str(tmp_path / "store"), SIZE)
    with pytest.raises(WorldBroken, match=r"could not be formed: Connection reset by peer$"):
        form(store, Formation(), 0, LISTENS, 30)
    assert ended == ["aborted", "closed"]


def test_a_world_on_a_gpu_is_formed_on_the_device_of_the_caller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    devices: list[tuple[int, threading.Thread]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, threading.current_thread())))
    threads: list[threading.Thread] = []

    def connect(*_: Any) -> Any:
        threads.append(threading.current_thread())
        raise RuntimeError("enough")

    monkeypatch.setattr(distributed, "_hosts", connect)
    with pytest.raises(WorldBroken, match="enough"):
        DistributedEngine.form(
            FileStore(str(tmp_path / "store"), SIZE),
            Formation(),
            rank=0,
            size=SIZE,
            generation=0,
            device=torch.device("cuda"),
            address=LISTENS,
            forming_timeout=LONG,
        )
    assert devices == [(3, threads[0])]


def test_a_fixed_world_is_waited_for_no_longer_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "new_group", lambda **_: stuck.wait(10))
    since = time.monotonic()
    with pytest.raises(WorldBroken, match=r"not within 0\.2 s"):
        DistributedEngine.join(None, torch.device("cpu"), timeout=SOON)
    assert time.monotonic() - since < 5
    stuck.set()
