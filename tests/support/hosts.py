"""Two hosts on one machine: network namespaces that a cable joins, for the root user of a Linux."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from support.elastic import Cluster, Course

from elastic_batch.worker.credentials import ADDRESS, COORDINATOR, RUN_DIR, TOKEN_FILE

_NET_NAMESPACE = 0x40000000
_ESTABLISHED = "01"


def why_no_hosts() -> str | None:
    """Why this machine cannot make them; None: it can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if shutil.which("ip") is None:
        return "needs the command ip (Debian package iproute2)"
    name = f"eb-probe-{os.getpid()}"
    tried = subprocess.run(("ip", "netns", "add", name), capture_output=True, text=True)
    if tried.returncode != 0:
        return f"no network namespace can be made: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@dataclass(frozen=True)
class Host:
    """One end of the cable.

    Args:
        namespace: Its name, as `ip netns` has it.
        address: Of its end of the cable.
    """

    namespace: str
    address: str

    def enter(self) -> None:
        """Have the calling thread, and what it starts, live there."""
        _enter(Path("/run/netns", self.namespace))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Live there for a while."""
        with open("/proc/thread-self/ns/net") as here:
            self.enter()
            try:
                yield
            finally:
                _enter(Path(f"/proc/self/fd/{here.fileno()}"))

    def set_cable(self, condition: str) -> None:
        """Set this end `up` or `down`."""
        _ip("-n", self.namespace, "link", "set", "cable", condition)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts 10.77.0.1 and 10.77.0.2, each with a loopback interface too."""
    first, second = hosts = (
        Host(f"eb-{os.getpid()}-1", "10.77.0.1"),
        Host(f"eb-{os.getpid()}-2", "10.77.0.2"),
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        peer = ("peer", "name", "cable", "netns", second.namespace)
        _ip("link", "add", "cable", "netns", first.namespace, "type", "veth", *peer)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "cable")
            host.set_cable("up")
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(("ip", "netns", "del", host.namespace), capture_output=True)


class TwoHosts(Cluster):
    """A coordinator on the first of two hosts, and workers on both; they know its address and a file with the token.

    Args:
        run_dir: The run's directory, which both hosts see.
        course: How workers train.
        hosts: Where.
        options: As the cluster's.
    """

    def __init__(self, run_dir: Path, course: Course, hosts: tuple[Host, Host], options: tuple[str, ...] = ()) -> None:
        self.hosts = hosts
        run_dir.mkdir(parents=True)
        self.token_file = run_dir.parent / "token"
        self.token_file.write_text("0123456789abcdef")
        where = ("--host", hosts[0].address, "--token-file", str(self.token_file))
        super().__init__(run_dir, course, options=(*where, *options))

    def start_coordinator(self, faults: str = "") -> None:
        with self.hosts[0].inside():
            super().start_coordinator(faults)

    def status(self) -> dict[str, Any] | None:
        with self.hosts[0].inside():
            return super().status()

    def start_worker_on(self, host: Host, slot: str, address: str | None = None) -> None:
        """Start a warm worker; `address` is what it is told of its own."""
        self.start_worker(slot, prepare=partial(_settle, host, self.url, str(self.token_file), address))

    @property
    def url(self) -> str:
        """The coordinator's."""
        return str(json.loads((self.run_dir / "coordinator.json").read_bytes())["url"])

    def connections(self) -> set[tuple[tuple[str, int], tuple[str, int]]]:
        """Both ends, (address, port), of every connection that stands on either host."""
        pids = [process.pid for process in self.workers.values() if process.is_alive()]
        return {ends for pid in pids for ends in _connections(Path(f"/proc/{pid}/net/tcp"))}


def _settle(host: Host, url: str, token_file: str, address: str | None) -> None:
    """Make this process a worker of a host that was told where the coordinator is."""
    host.enter()
    del os.environ[RUN_DIR]
    os.environ.update({COORDINATOR: url, TOKEN_FILE: token_file} | ({ADDRESS: address} if address is not None else {}))


def _connections(table: Path) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    for line in table.read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        if state == _ESTABLISHED:
            yield _end(local), _end(remote)


def _end(text: str) -> tuple[str, int]:
    address, port = text.split(":")
    return socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)


def _enter(path: Path) -> None:
    with path.open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NET_NAMESPACE) != 0:
            raise OSError(ctypes.get_errno(), "cannot enter a network namespace", str(path))


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True)
