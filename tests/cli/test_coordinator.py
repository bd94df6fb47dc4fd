"""`elastic-batch coordinator`: exit codes, signals, what survives a kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fake_worker import connected

from elastic_batch.cli.main import main
from elastic_batch.coordinator.announcement import FILE, read_announcement
from elastic_batch.protocol import Abort, Form

_PATIENCE_SECONDS = 30.0


@contextmanager
def coordinator(run_dir: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A coordinator process that has announced itself."""
    command = [sys.executable, "-m", "elastic_batch", "coordinator", "--run-dir", str(run_dir), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not _is_announced(run_dir, process.pid):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def _is_announced(run_dir: Path, pid: int) -> bool:
    said = read_announcement(run_dir) if (run_dir / FILE).exists() else None
    return said is not None and said.pid == pid


def test_a_complete_job_ends_it_with_0(tmp_path: Path) -> None:
    async def train() -> None:
        async with connected(tmp_path, "a") as a:
            await a.ready()
            await a.enter()
            await a.bye("finished")

    with coordinator(tmp_path) as process:
        asyncio.run(train())
        assert process.wait(_PATIENCE_SECONDS) == 0


def test_a_stopped_run_ends_it_with_75(tmp_path: Path) -> None:
    async def train() -> None:
        async with connected(tmp_path, "a") as a:
            await a.ready()
            await a.enter()
            await a.bye("stopped")

    with coordinator(tmp_path) as process:
        asyncio.run(train())
        assert process.wait(_PATIENCE_SECONDS) == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_world_survives_the_end_of_its_coordinator(tmp_path: Path, number: signal.Signals) -> None:
    async def form_world() -> tuple[Form, str]:
        async with connected(tmp_path, "a") as a:
            await a.ready()
            form = await a.enter()
            os.kill(process.pid, number)
            await a.socket.wait_closed()
            assert not any(isinstance(message, Abort) for message in a.unheard)
            return form, json.loads((tmp_path / FILE).read_bytes())["run_id"]

    async def return_to_it() -> None:
        async with connected(tmp_path, "a", generation=form.generation, members=form.members, run_id=run_id) as a:
            await a.beat()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await a.hear(Abort)

    with coordinator(tmp_path, "--eviction-seconds", "60") as process:
        form, run_id = asyncio.run(form_world())
        assert process.wait(_PATIENCE_SECONDS) == (143 if number == signal.SIGTERM else -9)
    with coordinator(tmp_path, "--eviction-seconds", "60"):
        asyncio.run(return_to_it())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--min-workers", "0"], "--min-workers = 0: must be at least 1"),
        (["--min-workers", "3", "--max-workers", "2"], "--max-workers = 2: must be at least --min-workers, 3"),
        (["--max-workers", "0"], "--max-workers = 0: must be at least --min-workers, 1"),
        (["--spares", "-1"], "--spares = -1"),
        (["--crashes", "0"], "--crashes = 0: must be at least 1"),
        (["--beat-seconds", "0"], "--beat-seconds = 0.0: must be above 0"),
        (["--stall-seconds", "nan"], "--stall-seconds = nan: must be above 0"),
        (["--eviction-seconds", "inf"], "--eviction-seconds = inf: must be above 0, and finite"),
        (["--eviction-seconds", "2"], "--eviction-seconds = 2.0: must be more than twice --beat-seconds, 1"),
        (["--advertise", "http://here:7077"], "--advertise = 'http://here:7077': must be a host's name or address"),
        (["--port", "70000"], "--port = 70000"),
        (["--tls-cert", "cert.pem"], "--tls-cert = 'cert.pem': needs --tls-key too"),
        (["--tls-cert", __file__, "--tls-key", __file__], "must be a PEM certificate that belongs to --tls-key"),
        (["--host", "192.0.2.1"], "--host = '192.0.2.1': must be an address of this machine"),
        (["--token-file", "none"], "--token-file = 'none': must be readable"),
        (["--run-dir", __file__], "--run-dir = '" + __file__ + "': must be a directory that can be written to"),
        (["none.yaml"], "no such file"),
    ],
)
def test_impossible_settings_are_one_message_and_exit_code_2(
    tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coordinator", "--run-dir", str(tmp_path / "run"), *flags], {}) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / FILE).exists()


def test_a_run_directory_in_use_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_batch.rundir.hold.PATIENCE_SECONDS", 0.1)
    (tmp_path / "script.py").write_text("")
    run_dir = ["--run-dir", str(tmp_path / "run")]
    with coordinator(tmp_path / "run") as process:
        for command in (
            ["coordinator", *run_dir],
            ["train", "digits", *run_dir],
            ["train", "digits", *run_dir, "--workers", "1", "--resume", "auto"],
            ["run", *run_dir, "--workers", "1", str(tmp_path / "script.py")],
        ):
            assert main(command, {}) == 2
            assert f"is in use by process {process.pid} on" in capsys.readouterr().err
        assert not (tmp_path / "run" / "logs").exists(), "no worker was started for the other run"


def test_a_damaged_journal_is_one_message_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"no database at all " * 100)
    assert main(["coordinator", "--run-dir", str(tmp_path)], {}) == 1
    shown = capsys.readouterr().err
    assert "is damaged" in shown
    assert "Traceback" not in shown


def test_without_workers_in_the_stated_time_it_says_so_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coordinator", "--run-dir", str(tmp_path), "--start-seconds", "0.3", "--min-workers", "2"], {}) == 1
    error = capsys.readouterr().err
    assert "no world started within 0.3 s: 0 of at least 2 workers are ready" in error
    assert "elastic-batch worker" in error
