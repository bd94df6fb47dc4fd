"""The connections that a process group opened, and only those, are shut down."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from elastic_batch.engines import Formation
from elastic_batch.engines.sockets import (
    ANY_PORT,
    Address,
    any_ended,
    connections_between,
    listening,
    open_sockets,
    opened_since,
    shut_down,
)


def _connected() -> tuple[socket.socket, socket.socket, socket.socket]:
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    return server, client, accepted


def test_a_world_s_connections_are_shut_down_and_older_ones_are_not() -> None:
    old_server, old_client, old_accepted = _connected()
    formation = Formation()
    server, client, accepted = _connected()
    formation.expect([old_server.getsockname(), server.getsockname()], [])
    formation.abort()
    assert formation.is_aborted
    assert client.recv(1) == b""
    old_accepted.send(b"x")
    assert old_client.recv(1) == b"x"
    again = socket.create_connection(server.getsockname())  # the listening socket still listens
    for each in (old_server, old_client, old_accepted, server, client, accepted, again):
        each.close()


def test_nothing_is_the_world_s_before_it_is_known_where_its_workers_listen() -> None:
    formation = Formation()
    server, client, accepted = _connected()
    formation.abort()
    accepted.send(b"x")
    assert client.recv(1) == b"x"
    for each in (server, client, accepted):
        each.close()


@pytest.mark.parametrize(
    ("here", "peers", "found"),
    [
        ([], [], set()),
        ([("127.0.0.1", 1)], [("127.0.0.1", 2), ("127.0.0.9", ANY_PORT)], set()),
        (["its"], [], {"accepted"}),
        ([], ["its"], {"client"}),
        ([], [("127.0.0.1", ANY_PORT)], {"client", "accepted"}),
    ],
)
def test_connections_for_something_else_that_are_made_meanwhile_are_left_alone(
    here: list[Address | str], peers: list[Address | str], found: set[str]
) -> None:
    before = open_sockets()
    server, client, accepted = _connected()
    unconnected = socket.socket()
    its: Address = server.getsockname()
    assert listening(opened_since(before)) == [its]
    ours = connections_between(
        opened_since(before),
        [its if isinstance(each, str) else each for each in here],
        [its if isinstance(each, str) else each for each in peers],
    )
    assert ours.keys() == {{"client": client, "accepted": accepted}[name].fileno() for name in found}
    for each in (server, client, accepted, unconnected):
        each.close()


@pytest.mark.parametrize("which", ["nobody", "this side", "the other side", "this side, and another took its number"])
def test_a_connection_that_ended_is_noticed_on_whichever_side(which: str) -> None:
    before = open_sockets()
    server, client, accepted = _connected()
    ours = {number: inode for number, inode in opened_since(before).items() if number != accepted.fileno()}
    assert not any_ended(ours)
    others = [server, client, accepted]
    if which.startswith("this side"):
        number = client.fileno()
        client.close()
        if "another" in which:
            others.append(socket.create_connection(server.getsockname()))
            assert others[-1].fileno() == number
    elif which == "the other side":
        accepted.close()
    assert any_ended(ours) == (which != "nobody")
    for each in others:
        each.close()


def test_a_descriptor_that_another_socket_got_since_is_left_alone() -> None:
    before = open_sockets()
    server, client, accepted = _connected()
    ours = {client.fileno(): opened_since(before)[client.fileno()]}
    number = client.fileno()
    client.close()
    stranger = socket.create_connection(server.getsockname())
    assert stranger.fileno() == number
    shut_down(ours)
    peer, _ = server.accept()
    peer.send(b"x")
    assert stranger.recv(1) == b"x"
    for each in (server, accepted, stranger, peer):
        each.close()


def test_a_descriptor_that_a_file_got_since_is_left_alone(tmp_path: Path) -> None:
    before = open_sockets()
    server, client, accepted = _connected()
    number = client.fileno()
    ours = {number: opened_since(before)[number]}
    client.close()
    with (tmp_path / "file").open("w") as file:
        assert file.fileno() == number
        open_files = os.listdir("/proc/self/fd")
        shut_down(ours)
        assert os.listdir("/proc/self/fd") == open_files
    server.close()
    accepted.close()


def test_sockets_that_are_not_of_a_network_do_not_count() -> None:
    before = open_sockets()
    left, right = socket.socketpair()
    assert opened_since(before) == {}
    left.close()
    right.close()


def test_shutting_down_what_is_closed_is_no_error() -> None:
    shut_down({999_999: 1})
    with pytest.raises(OSError, match="Bad file descriptor"):
        socket.socket(fileno=999_999)
