"""Coordinators on real sockets, in the test's own event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from elastic_batch.coordinator.announcement import Announcement, read_announcement
from elastic_batch.coordinator.config import CoordinatorConfig
from elastic_batch.coordinator.server import Coordinator, Outcome
from elastic_batch.coordinator.state import MembershipConfig

PATIENCE_SECONDS = 10.0
QUICK = {"max_workers": 8, "reconnect_grace": 0.5, "orphan_grace": 0.5, "beat": 0.2}


class Serving:
    """A coordinator that serves.

    Args:
        coordinator: It.
        task: Its service.
        announcement: Where it is.
        http: A client that has the token.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        task: asyncio.Task[Outcome],
        announcement: Announcement,
        http: httpx.AsyncClient,
    ) -> None:
        self.coordinator, self.task, self.announcement, self.http = coordinator, task, announcement, http

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.http.get("/status")).json()
        return found

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status that meets a condition."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition(found := await self.status()):
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.01)
        return found

    async def outcome(self) -> Outcome:
        """How it ends by itself."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.task


@asynccontextmanager
async def serving(
    run_dir: Path, *, settings: dict[str, Any] | None = None, **membership: Any
) -> AsyncIterator[Serving]:
    """A coordinator of a run directory; it ends with the block, as by SIGTERM."""
    config = CoordinatorConfig(
        run_dir=run_dir, membership=MembershipConfig(**{**QUICK, **membership}), **(settings or {})
    )
    with Coordinator(config) as coordinator:
        announcement = read_announcement(run_dir)
        assert announcement is not None
        task = asyncio.create_task(coordinator.serve())
        headers = {"Authorization": f"Bearer {announcement.token}"}
        async with httpx.AsyncClient(base_url=announcement.url, headers=headers, trust_env=False) as http:
            yield Serving(coordinator, task, announcement, http)
        coordinator.stop()
        await task
