"""The listening socket."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from elastic_batch.coordinator.config import CoordinatorConfig
from elastic_batch.coordinator.listening import bind, public_url
from elastic_batch.coordinator.state import MembershipConfig


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
