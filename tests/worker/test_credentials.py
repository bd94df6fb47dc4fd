"""A worker finds the coordinator by the environment, or says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.worker.credentials import Credentials, Door


def _announce(folder: Path, url: str = "http://127.0.0.1:7077") -> None:
    (folder / "coordinator.json").write_text(json.dumps({"url": url, "token": "secret", "run_id": "r"}))


def test_the_run_directory_says_everything(tmp_path: Path) -> None:
    _announce(tmp_path)
    credentials = Credentials.from_environment({"ELASTIC_BATCH_RUN_DIR": str(tmp_path)})
    assert credentials.door() == Door("http://127.0.0.1:7077", "secret")
    _announce(tmp_path, "http://127.0.0.1:7078")  # a restarted coordinator has moved
    assert credentials.door().websocket_url == "ws://127.0.0.1:7078/worker"


def test_an_address_and_a_file_with_the_token_do(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("open sesame\n")
    environ = {"ELASTIC_BATCH_COORDINATOR": "https://host:1", "ELASTIC_BATCH_TOKEN_FILE": str(token)}
    assert Credentials.from_environment(environ).door() == Door("https://host:1", "open sesame")


def test_the_announcement_may_be_the_token_s_file(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.json"
    file.write_text(json.dumps({"url": "https://other:1", "token": "secret", "tls_cert": "/cert.pem"}))
    environ = {"ELASTIC_BATCH_COORDINATOR": "https://host:1", "ELASTIC_BATCH_TOKEN_FILE": str(file)}
    assert Credentials.from_environment(environ).door() == Door("https://host:1", "secret", "/cert.pem")


def test_a_coordinator_that_has_not_come_yet_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no coordinator\.json yet"):
        Credentials.from_environment({"ELASTIC_BATCH_RUN_DIR": str(tmp_path)}).door()


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"ELASTIC_BATCH_COORDINATOR": "host:1"}, "http://10.0.0.1:7077"),
        ({"ELASTIC_BATCH_COORDINATOR": "http://host:1"}, "ELASTIC_BATCH_TOKEN_FILE"),
    ],
)
def test_what_is_wrong_or_missing_is_named(environ: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidSetting, match=text):
        Credentials.from_environment(environ)


def test_an_unreadable_token_is_named(tmp_path: Path) -> None:
    environ = {"ELASTIC_BATCH_COORDINATOR": "http://h:1", "ELASTIC_BATCH_TOKEN_FILE": str(tmp_path / "none")}
    with pytest.raises(InvalidSetting, match="must be readable"):
        Credentials.from_environment(environ).door()
