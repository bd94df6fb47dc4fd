"""What a supervisor asks of the coordinator."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from elastic_batch.scaling.link import CoordinatorAway, CoordinatorElsewhere, CoordinatorLink, Status

ASKED: list[tuple[str, str, str]] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"desired_workers": 2, "position": 64})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        ASKED.append((self.path, self.headers["Authorization"], self.rfile.read(length).decode()))
        self._answer({})

    def _answer(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(200 if self.headers["Authorization"] == "Bearer secret" else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    ASKED.clear()
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(link: CoordinatorLink, method: str, *arguments: str) -> Any:
    async def asking() -> Any:
        try:
            return await getattr(link, method)(*arguments)
        finally:
            await link.close()

    return asyncio.run(asking())


def test_a_run_directory_is_enough(url: str, tmp_path: Path) -> None:
    (tmp_path / "coordinator.json").write_text(json.dumps({"url": url, "token": "secret"}))
    link = CoordinatorLink(run_dir=tmp_path)
    status = ask(link, "status")
    assert (status.wanted, status.position, status.members) == (2, 64, set())
    ask(link, "exited", "a-1-local-0")
    ask(link, "stop", "SIGINT")
    assert [path for path, _, _ in ASKED] == ["/workers/a-1-local-0/exited", "/stop"]
    assert json.loads(ASKED[1][2]) == {"reason": "SIGINT"}


def test_an_address_and_a_file_with_the_token_are_enough(url: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    assert ask(CoordinatorLink(url=url, token_file=tmp_path / "token"), "status").wanted == 2


def test_a_coordinator_that_moved_is_found_again(url: str, tmp_path: Path) -> None:
    announcement = tmp_path / "coordinator.json"
    announcement.write_text(json.dumps({"url": "http://127.0.0.1:1", "token": "secret"}))
    link = CoordinatorLink(run_dir=tmp_path)
    with pytest.raises(CoordinatorAway):
        ask(link, "status")
    announcement.write_text(json.dumps({"url": url, "token": "secret"}))
    assert ask(link, "status").wanted == 2


def test_nobody_there_and_a_wrong_token_are_the_same_to_a_supervisor(url: str, tmp_path: Path) -> None:
    with pytest.raises(CoordinatorAway, match=r"coordinator.json cannot be read"):
        ask(CoordinatorLink(run_dir=tmp_path), "status")
    (tmp_path / "token").write_text("wrong")
    with pytest.raises(CoordinatorAway, match="401"):
        ask(CoordinatorLink(url=url, token_file=tmp_path / "token"), "status")


@pytest.mark.parametrize("url", ["http://[", "http://a b:c"])
def test_an_address_that_is_none_is_a_coordinator_that_is_away(url: str, tmp_path: Path) -> None:
    (tmp_path / "coordinator.json").write_text(json.dumps({"url": url, "token": "secret"}))
    with pytest.raises(CoordinatorAway):
        ask(CoordinatorLink(run_dir=tmp_path), "status")


def test_the_end_of_a_run_is_announced_or_not(tmp_path: Path) -> None:
    link = CoordinatorLink(run_dir=tmp_path)
    found = []
    for announced in (None, {"token": "secret"}, {"token": "secret", "ended": "stopped: SIGINT"}):
        if announced is not None:
            (tmp_path / "coordinator.json").write_text(json.dumps(announced))
        found.append(link.announced_end())
    assert found == [None, None, "stopped: SIGINT"]


def test_a_run_that_was_stopped_is_over_and_not_complete() -> None:
    stands = [Status(ended=ended) for ended in (None, "stopped: SIGINT", "the job is complete")]
    assert [(status.is_over, status.is_complete) for status in stands] == [(False, False), (True, False), (True, True)]


def test_those_in_the_world_are_told_from_those_outside() -> None:
    states = ("joining", "standby", "spare", "active", "draining", "gone", "lost", "cooling down")
    workers = [{"name": state, "state": state} for state in states]
    assert Status(workers=workers).members == {"spare", "active", "draining"}
    assert Status().members == set()


@pytest.mark.parametrize(("host", "is_elsewhere"), [("another-host", True), (socket.gethostname(), False)])
def test_a_coordinator_that_serves_another_host_alone_is_told_from_one_that_is_away(
    host: str, is_elsewhere: bool, tmp_path: Path
) -> None:
    announced = {"url": "http://127.0.0.1:9", "token": "secret", "host": host}
    (tmp_path / "coordinator.json").write_text(json.dumps(announced))
    with pytest.raises(CoordinatorAway) as raised:
        ask(CoordinatorLink(run_dir=tmp_path), "status")
    assert isinstance(raised.value, CoordinatorElsewhere) is is_elsewhere
    assert ("listens on another-host for workers of that host alone" in str(raised.value)) is is_elsewhere
