"""Pools and supervisors whose workers import nothing, and a coordinator that says what a test wants.

As a program: `supervision.py SCRIPT FOLDER` supervises two workers until it is told to end.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from elastic_batch.scaling.link import CoordinatorAway, CoordinatorLink, Status
from elastic_batch.scaling.pool import Pool, PoolSettings, Program
from elastic_batch.scaling.supervisor import SupervisorSettings, supervise

SLOT, NAME, LATER = "SLOT", "NAME", "LATER"


class FakeLink(CoordinatorLink):
    """A coordinator that was never started.

    Attributes:
        now: What `status` gives; None: it does not answer.
        told: What it was told.
        num_asked: How often it was asked how things stand.
    """

    def __init__(self, now: dict[str, Any] | None = None) -> None:
        super().__init__(url="http://127.0.0.1:1")
        self.now = now
        self.told: list[str] = []
        self.num_asked = 0

    async def status(self) -> Status:
        self.num_asked += 1
        if self.now is None:
            raise CoordinatorAway("not there")
        return Status(self.now)

    async def exited(self, worker: str) -> None:
        self.told.append(f"exited {worker}")

    async def stop(self, reason: str) -> None:
        self.told.append(f"stop {reason}")


def write_script(folder: Path, text: str) -> Path:
    """A script for workers."""
    script = folder / "script.py"
    script.write_text(text)
    return script


def pool_settings(script: Path, num_slots: int = 2, *arguments: str) -> PoolSettings:
    """Workers that run a script, and keep logs in the folder beside it."""
    return PoolSettings(
        program=Program(script=str(script), arguments=arguments),
        slots=[f"local-{index}" for index in range(num_slots)],
        environ=dict(os.environ),
        slot_variable=SLOT,
        name_variable=NAME,
        later_variable=LATER,
        log_dir=script.parent / "logs",
        modules=(),
    )


def in_pool(settings: PoolSettings, scenario: Callable[[Pool], Any]) -> tuple[list[str], list[str]]:
    """Run a scenario with a pool; returns the lines shown and the workers reported as ended."""
    shown: list[str] = []
    ended: list[str] = []

    async def run() -> None:
        pool = Pool(settings, shown.append, ended.append)
        await pool.start()
        try:
            await asyncio.wait_for(scenario(pool), 30)
        finally:
            await pool.close()

    asyncio.run(run())
    return shown, ended


async def until(pool: Pool, condition: Callable[[], bool]) -> None:
    """Keep the pool going until something holds."""
    while not condition():
        await pool.wait_for_change(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def supervisor_settings(script: Path, coordinator: tuple[str, ...] | None = None) -> SupervisorSettings:
    """Two workers, and a coordinator if arguments for `elastic-batch` are given."""
    return SupervisorSettings(
        pool=pool_settings(script), num_workers=2, coordinator=coordinator, log_dir=script.parent / "logs"
    )


if __name__ == "__main__":
    code = supervise(supervisor_settings(Path(sys.argv[1])), FakeLink({}), click.echo)
    sys.exit(code)
