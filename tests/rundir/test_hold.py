"""One process at a time has a run directory."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from support.holders import other_process

from elastic_batch.errors import RunDirectoryBusy
from elastic_batch.rundir import Hold, hold


def test_a_directory_that_another_process_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "PATIENCE_SECONDS", 0.1)
    with other_process(tmp_path / "run") as process:
        expected = f"is in use by process {process.pid} on {socket.gethostname()}"
        with pytest.raises(RunDirectoryBusy, match=expected):
            Hold(tmp_path / "run")


def test_a_holder_that_ends_soon_is_waited_for(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        timer = threading.Timer(0.3, process.terminate)
        timer.start()
        Hold(tmp_path).close()
        timer.join()


def test_a_killed_holder_leaves_nothing_behind_though_its_children_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "PATIENCE_SECONDS", 0.1)
    with other_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        with Hold(tmp_path):
            assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_directory_that_was_given_back_can_be_held_again(tmp_path: Path) -> None:
    with Hold(tmp_path) as held:
        held.close()
    with other_process(tmp_path):
        pass


def test_without_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    with other_process(tmp_path):
        monkeypatch.setattr("fcntl.lockf", no_locks)
        Hold(tmp_path).close()
