"""What data workers inherit: no connection of the parent's, and no life beyond it."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PARENT = textwrap.dedent("""
    import os, socket, sys, time
    import torch
    from torch.utils.data import Dataset
    from elastic_batch.data import PassRequest, open_source
    from elastic_batch.stream import SampleStream

    class Pids(Dataset):
        def __len__(self): return 64
        def __getitem__(self, index):
            time.sleep(0.1)
            # A copy of the parent's socket object that is collected must not close a file that was opened since.
            global connection, listener
            connection = listener = None
            with open(__file__) as file:
                assert file.read()
            return os.getpid()

    torch.set_num_threads(1)
    listener = socket.create_server(("127.0.0.1", 0))
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    source = open_source(Pids(), stream=SampleStream(64, 2), micro_batch_size=8, device="cpu", num_workers=2,
                         start_method="fork")
    source.start(PassRequest(8 * i, 1) for i in range(10**6))
    pids = {int(pid) for _ in range(4) for pid in source.next()}
    connection.sendall(f"{listener.getsockname()[1]} {' '.join(map(str, pids))}\\n".encode())
    time.sleep(60)
""")


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        yield listener


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed in /proc")
def test_the_peer_of_a_killed_parent_sees_the_end_at_once_and_the_workers_die(
    server: socket.socket, tmp_path: Path
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script), str(server.getsockname()[1])])
    try:
        peer, _ = server.accept()
        with peer:
            peer.settimeout(60)
            port, *pids = map(int, peer.makefile().readline().split())
            assert len(pids) == 2
            parent.send_signal(signal.SIGKILL)
            started = time.monotonic()
            assert select.select([peer], [], [], 5)[0]
            assert peer.recv(1) == b""
            assert time.monotonic() - started < 0.2
            parent.wait(10)
            while not all(map(is_gone, pids)):
                assert time.monotonic() - started < 2
                time.sleep(0.01)
            with socket.socket() as again:  # nobody listens on the parent's port any more
                assert again.connect_ex(("127.0.0.1", port)) != 0
    finally:
        parent.kill()
        parent.wait(10)
