"""The coordinator as a process."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from elastic_batch.scaling import coordinator_process
from elastic_batch.scaling.coordinator_process import CoordinatorProcess
from elastic_batch.scaling.processes import start_python


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_process, "_LONGEST_DELAY_SECONDS", 0.001)


def run(process: CoordinatorProcess) -> int:
    async def until_its_end() -> int:
        try:
            return await asyncio.wait_for(process.run(), 30)
        finally:
            await process.end()
            process.close()

    return asyncio.run(until_its_end())


def counting(counter: Path, code: str) -> str:
    """What a coordinator runs: `number` is 1 in the first process, 2 in the next."""
    return f"f = open({str(counter)!r}, 'a+'); f.write('x'); f.seek(0); number = len(f.read()); f.close(); {code}"


def test_it_is_started_again_when_it_dies_and_given_up_if_that_does_not_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_process, "_CODE", "sys.exit(1)")
    shown: list[str] = []
    assert run(CoordinatorProcess([], shown.append, tmp_path, lambda: False)) == 1
    assert shown.count("the coordinator ended with code 1; starting it again, training goes on") == 5
    assert shown[-1] == "the coordinator ended with code 1, as often before, and nothing was trained meanwhile"


def test_with_progress_in_between_it_may_die_any_number_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "starts"
    monkeypatch.setattr(coordinator_process, "_CODE", counting(counter, "sys.exit(1 if number < 9 else 75)"))
    process = CoordinatorProcess([], lambda _: process.answered(counter.stat().st_size), tmp_path, lambda: False)
    assert run(process) == 75


def test_while_workers_train_it_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = counting(tmp_path / "starts", "sys.exit(1 if number < 9 else 75)")
    monkeypatch.setattr(coordinator_process, "_CODE", code)
    assert run(CoordinatorProcess([], lambda _: None, tmp_path, lambda: True)) == 75


def test_one_that_cannot_be_started_at_the_moment_is_started_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [errno.EAGAIN]

    async def start_at_last(*arguments: Any, **fields: Any) -> asyncio.subprocess.Process:
        if failures:
            raise OSError(failures.pop(), "Resource temporarily unavailable")
        return await start_python(*arguments, **fields)

    monkeypatch.setattr(coordinator_process, "start_python", start_at_last)
    monkeypatch.setattr(coordinator_process, "_CODE", "sys.exit(0)")
    shown: list[str] = []
    assert run(CoordinatorProcess([], shown.append, tmp_path, lambda: False)) == 0
    assert "Resource temporarily unavailable); starting it again" in shown[0]


def test_one_that_hangs_is_killed_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_process, "_SILENT_SECONDS", 0.1)
    code = counting(tmp_path / "starts", "number > 1 and sys.exit(75); print('up', flush=True); ")
    monkeypatch.setattr(coordinator_process, "_CODE", code + "import time; time.sleep(100)")
    shown: list[str] = []

    async def scenario() -> int:
        process = CoordinatorProcess([], shown.append, tmp_path, lambda: False)
        running = asyncio.ensure_future(process.run())
        while "[coordinator] up" not in shown:
            process.unanswered()  # it has not begun to answer
            await asyncio.sleep(0.01)
        process.answered(0)
        while not running.done():
            process.unanswered()
            await asyncio.sleep(0.01)
        process.close()
        return running.result()

    assert asyncio.run(asyncio.wait_for(scenario(), 30)) == 75
    assert shown[1:] == [
        "the coordinator has not answered for 0 s and is killed",
        "the coordinator ended with code -9; starting it again, training goes on",
    ]
