"""The listening socket."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from elastic_batch.coordinator.config import CoordinatorConfig
from elastic_batch.coordinator.listening import bind, public_url
from elastic_batch.coordinator.state import MembershipConfig
from elastic_batch.errors import InvalidSetting


@pytest.mark.parametrize("last_port", [0, 1])  # of which the second cannot be had again
def test_no_message_waits_for_the_one_before_it_to_be_acknowledged(tmp_path: Path, last_port: int) -> None:
    config = CoordinatorConfig(run_dir=tmp_path, membership=MembershipConfig())
    with bind(config, last_port) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_whoever_listens_everywhere_is_reached_at_the_address_that_is_announced(tmp_path: Path) -> None:
    config = CoordinatorConfig(run_dir=tmp_path, membership=MembershipConfig(), host="::")
    with bind(config, 0) as listener:
        port = listener.getsockname()[1]
        assert public_url(config, listener).endswith(f":{port}")
        for loopback in ("127.0.0.1", "::1"):
            socket.create_connection((loopback, port), 5).close()


def test_a_port_that_is_taken_and_an_address_that_is_another_machines_name_their_flags(tmp_path: Path) -> None:
    config = CoordinatorConfig(run_dir=tmp_path)
    with bind(config, 0) as listener:
        taken = CoordinatorConfig(run_dir=tmp_path, port=listener.getsockname()[1])
        with pytest.raises(InvalidSetting, match=f"^--port = {taken.port}: must be free on 127.0.0.1"):
            bind(taken, 0)
    with pytest.raises(InvalidSetting, match=r"^--host = '192.0.2.1': must be an address of this machine"):
        bind(CoordinatorConfig(run_dir=tmp_path, host="192.0.2.1"), 0)
