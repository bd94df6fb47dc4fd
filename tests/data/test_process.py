"""What data workers inherit: no connection of the parent's, and no life beyond it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="data workers elsewhere are not forked")

PARENT = textwrap.dedent("""
    import os, socket, sys, threading, time
    import torch
    from torch.utils.data import Dataset
    from elastic_batch.data import PassRequest, open_source
    from elastic_batch.stream import SampleStream

    class Pids(Dataset):
        def __len__(self): return 64
        def __getitem__(self, index):
            time.sleep(0.01)
            # A copy of the parent's socket object that is collected must not close a file that was opened since.
            global connection, listener
            with open(__file__) as file:
                connection = listener = None
                assert file.read()
            return os.getpid()

    torch.set_num_threads(1)
    listener = socket.create_server(("127.0.0.1", 0))
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    source = open_source(Pids(), stream=SampleStream(64, 2), micro_batch_size=8, device="cpu", num_workers=2,
                         start_method="fork")
    start = lambda: source.start(PassRequest(8 * i, 1) for i in range(10**6))
    if sys.argv[2] == "thread":
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    else:
        start()
    pids = {int(pid) for _ in range(4) for pid in source.next()}
    connection.sendall(f"{listener.getsockname()[1]} {' '.join(map(str, pids))}\\n".encode())
    time.sleep(60)
""")


@contextmanager
def running_parent(
    directory: Path, starter: str
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket, int, list[int]]]:
    """A process with data workers, connected to us: (process, our end, the port it listens on, its workers)."""
    script = directory / "parent.py"
    script.write_text(PARENT)
    pids: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        parent = subprocess.Popen([sys.executable, str(script), str(listener.getsockname()[1]), starter])
        try:
            peer, _ = listener.accept()
            with peer, peer.makefile() as lines:
                peer.settimeout(60)
                port, *pids = map(int, lines.readline().split())
                yield parent, peer, port, pids
        finally:
            parent.kill()
            parent.wait(10)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def is_listened_to(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def network_sockets(pid: int) -> set[str]:
    """Inodes of the TCP sockets that a process holds."""
    tables = [Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    inodes = {line.split()[9] for table in tables for line in table}
    links = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.add(os.readlink(entry))
    return {inode for inode in inodes if f"socket:[{inode}]" in links}


def test_workers_hold_no_connection_of_their_parent_so_its_peers_see_its_death_at_once(tmp_path: Path) -> None:
    # Workers that a thread has started are not killed with the parent: only what they hold decides here.
    with running_parent(tmp_path, "thread") as (parent, peer, port, pids):
        assert len(pids) == 2
        assert len(network_sockets(parent.pid)) == 2
        assert [network_sockets(pid) for pid in pids] == [set(), set()]
        parent.kill()
        started = time.monotonic()
        assert select.select([peer], [], [], 10)[0]
        assert peer.recv(1) == b""
        assert time.monotonic() - started < 1  # 0.05 s where the machine is not busy
        assert wait_until(lambda: not is_listened_to(port), 1)


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    with running_parent(tmp_path, "main") as (parent, _, _, pids):
        assert not any(map(is_gone, pids))
        parent.kill()
        assert wait_until(lambda: all(map(is_gone, pids)), 2)
