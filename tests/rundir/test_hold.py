"""One process at a time has a run directory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
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


def test_a_second_holder_of_the_same_process_shares_the_lock(tmp_path: Path) -> None:
    first, second = Hold(tmp_path), Hold(tmp_path)
    first.close()
    first.close()
    assert _is_busy_for_others(tmp_path)
    second.close()
    assert not _is_busy_for_others(tmp_path)


def test_a_forked_child_that_lets_go_leaves_its_parent_the_lock(tmp_path: Path) -> None:
    def let_go() -> None:
        held.close()

    with Hold(tmp_path) as held:
        child = multiprocessing.get_context("fork").Process(target=let_go)
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert _is_busy_for_others(tmp_path)


def test_a_holder_that_nobody_has_any_more_lets_go(tmp_path: Path) -> None:
    held = Hold(tmp_path)
    assert _is_busy_for_others(tmp_path)
    del held
    assert not _is_busy_for_others(tmp_path)


def test_a_holder_on_another_host_is_waited_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("socket.gethostname", lambda: "another-host")
    with other_process(tmp_path) as process:
        timer = threading.Timer(0.3, process.terminate)
        timer.start()
        Hold(tmp_path).close()
        timer.join()
    monkeypatch.setattr(hold, "OTHER_HOST_PATIENCE_SECONDS", 0.1)
    with other_process(tmp_path), pytest.raises(RunDirectoryBusy):
        Hold(tmp_path)


def _is_busy_for_others(directory: Path) -> bool:
    code = (
        "import sys; from pathlib import Path; from elastic_batch.rundir import Hold, hold; hold.PATIENCE_SECONDS = 0; "
        "Hold(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "RunDirectoryBusy" in done.stderr
    return done.returncode != 0


def test_without_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    with other_process(tmp_path):
        monkeypatch.setattr("fcntl.lockf", no_locks)
        Hold(tmp_path).close()
