"""The coordinator as a process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from elastic_batch.scaling import coordinator_process
from elastic_batch.scaling.coordinator_process import CoordinatorProcess


def run(process: CoordinatorProcess) -> int:
    async def until_its_end() -> int:
        try:
            return await asyncio.wait_for(process.run(), 30)
        finally:
            await process.end()
            process.close()

    return asyncio.run(until_its_end())


def test_it_is_started_again_when_it_dies_and_given_up_if_that_does_not_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_process, "_CODE", "sys.exit(1)")
    monkeypatch.setattr(coordinator_process, "_FIRST_DELAY_SECONDS", 0.001)
    shown: list[str] = []
    assert run(CoordinatorProcess([], shown.append, tmp_path)) == 1
    assert shown.count("the coordinator ended with code 1; starting it again, training goes on") == 5


def test_with_progress_in_between_it_may_die_any_number_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "starts"
    code = f"f = open({str(counter)!r}, 'a+'); f.write('x'); f.seek(0); sys.exit(1 if len(f.read()) < 9 else 75)"
    monkeypatch.setattr(coordinator_process, "_CODE", code)
    monkeypatch.setattr(coordinator_process, "_FIRST_DELAY_SECONDS", 0.001)
    process = CoordinatorProcess([], lambda _: process.progressed(counter.stat().st_size), tmp_path)
    assert run(process) == 75
