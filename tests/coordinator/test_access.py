"""Who is let in: token, Host and Origin, on every route and on the WebSocket."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop
from support.coordinators import serving
from support.fake_worker import connected
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from elastic_batch.coordinator.announcement import (
    FILE,
    Announcement,
    choose_token,
    read_announcement,
    write_announcement,
)
from elastic_batch.coordinator_client import CoordinatorClient
from elastic_batch.errors import InvalidSetting
from elastic_batch.protocol import PATH, Form

ROUTES = [
    ("GET", "/status"),
    ("GET", "/metrics"),
    ("POST", "/stop"),
    ("POST", "/workers/a/drain"),
    ("POST", "/workers/a/exited"),
    ("GET", "/nothing"),
]


@pytest.mark.parametrize(
    ("header", "words"), [(None, "no token"), ("Bearer wrong", "wrong token"), ("Basic x", "wrong")]
)
def test_no_route_opens_without_the_token(tmp_path: Path, header: str | None, words: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as coordinator:
            del coordinator.http.headers["Authorization"]
            for method, path in ROUTES:
                headers = {"Authorization": header} if header else {}
                answer = await coordinator.http.request(method, path, headers=headers)
                assert answer.status_code == 401, path
                assert words in answer.json()["error"]
                assert answer.headers["www-authenticate"] == "Bearer"
            assert (await coordinator.http.get("/healthz")).text == "ok\n"
            assert not coordinator.task.done()

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example:80"}, 400),
        ({"Host": ""}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "a.service:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
    ],
)
def test_a_page_of_another_site_is_refused_even_with_the_token(
    tmp_path: Path, headers: dict[str, str], code: int
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, settings={"allowed_hosts": ("a.service",)}) as coordinator:
            answers = [await coordinator.http.get(path, headers=headers) for path in ("/status", "/healthz")]
            assert [answer.status_code for answer in answers] == [code, code]

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("headers", "code", "words"),
    [
        ({}, 401, "no token"),
        ({"Authorization": "Bearer wrong"}, 401, "wrong token"),
        ({"Origin": "http://evil.example"}, 403, "another site"),
    ],
)
def test_the_websocket_is_refused_before_it_opens(
    tmp_path: Path, headers: dict[str, str], code: int, words: str
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as coordinator:
            url = "ws" + coordinator.announcement.url.removeprefix("http") + PATH
            with pytest.raises(InvalidStatus) as caught:
                await connect(url, additional_headers=headers, proxy=None)
            assert caught.value.response.status_code == code
            assert words in bytes(caught.value.response.body or b"").decode()

    uvloop.run(scenario())


def test_an_announcement_reads_back_as_it_was_written(tmp_path: Path) -> None:
    said = Announcement(url="http://h:1", token="x" * 32, run_id="r", pid=1, version="1", completed_end=96)
    write_announcement(tmp_path, said)
    assert read_announcement(tmp_path) == said
    assert said.host == socket.gethostname()


def test_the_announcement_can_be_read_by_its_owner_only(tmp_path: Path) -> None:
    async def scenario() -> Announcement:
        async with serving(tmp_path) as coordinator:
            assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
            return coordinator.announcement

    said = uvloop.run(scenario())
    assert said.url.startswith("http://127.0.0.1:")
    assert len(said.token) >= 32


def test_the_token_never_stands_in_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def scenario() -> str:
        async with serving(tmp_path) as coordinator:
            await coordinator.http.get("/status")
            return coordinator.announcement.token

    assert uvloop.run(scenario()) not in caplog.text


def test_a_token_file_wins_over_the_last_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    last = Announcement(url="http://h:1", token="x" * 32, run_id="r", pid=1, version="1")
    assert choose_token(file, last) == "0123456789abcdef"
    assert choose_token(None, last) == last.token
    assert choose_token(None, None) != choose_token(None, None)


@pytest.mark.parametrize("text", ["", "short", "two words of a token", "schlüssel-schlüssel"])
def test_a_bad_token_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(InvalidSetting, match="at least 16 ASCII characters"):
        choose_token(file, None)


def test_a_missing_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="must be readable"):
        choose_token(tmp_path / "none", None)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"url": 3})])
def test_an_announcement_that_is_none_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InvalidSetting, match=r"readable coordinator\.json"):
        read_announcement(tmp_path)


def test_the_coordinator_never_loads_torch() -> None:
    code = (
        "import sys, elastic_batch.coordinator.server, elastic_batch.coordinator.app, "
        "elastic_batch.coordinator_client, elastic_batch.cli.coordinator\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_with_a_certificate_everything_is_encrypted(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=30)

    async def scenario() -> None:
        async with serving(tmp_path, settings={"tls_cert": cert, "tls_key": key}) as coordinator:
            assert coordinator.announcement.url.startswith("https://")
            async with connected(tmp_path, "a") as a:
                await a.ready()
                assert (await a.hear(Form)).members == ("a",)
            found = await asyncio.to_thread(_status, tmp_path)
            assert found["generation"] == 1

    uvloop.run(scenario())


def test_a_certificate_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    file.write_text("no certificate")

    async def scenario() -> None:
        async with serving(tmp_path, settings={"tls_cert": file, "tls_key": file}):
            pass

    with pytest.raises(InvalidSetting, match="must be a PEM certificate"):
        uvloop.run(scenario())


def _status(run_dir: Path) -> dict[str, Any]:
    with CoordinatorClient.find({}, run_dir=run_dir) as client:
        return client.status()
