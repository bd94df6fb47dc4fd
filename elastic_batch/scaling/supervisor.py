"""One machine's part in an elastic job: its workers, on one of them the coordinator, from the start to the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_batch.scaling.coordinator_process import CoordinatorProcess
from elastic_batch.scaling.link import CoordinatorAway, CoordinatorElsewhere, CoordinatorLink, Status
from elastic_batch.scaling.output import Show, unfailing
from elastic_batch.scaling.pool import Pool, PoolSettings
from elastic_batch.scaling.restarts import EXIT_IMPOSSIBLE, EXIT_STOPPED

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_KILLED = 130
"""A second Ctrl-C or SIGTERM."""
_POLL_SECONDS = 0.2
"""A warm worker waits already when one more is wanted, so this delays none."""
_FAR_POLL_SECONDS = 2.0
"""The same of a coordinator elsewhere, which hundreds of machines may ask."""
_OUTSIDER_SECONDS = 2.0
"""For workers outside the world to hear that the run is over; those in it take the time they need."""
_KILL_SECONDS = 10.0
_SAVING_SECONDS = 600.0
"""For those in the world, where the job has failed: they may be saving their state."""
_AWAY_SECONDS = 10.0
"""Without an answer, when all workers of this machine ended well, the coordinator counts as gone."""
_HOPELESS_SECONDS = 1800.0
"""The same when some did not: it may return and want others. Workers themselves wait as long for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorSettings:
    """One machine's part in a job.

    Args:
        pool: Its workers.
        num_workers: How many it starts with.
        warm: How many more than are wanted are kept ready.
        follows_demand: Whether more are started when the job wants more; else `num_workers` it is.
        coordinator: Arguments of the coordinator to run; None: it runs elsewhere.
        log_dir: Where the coordinator's output is kept.
    """

    pool: PoolSettings
    num_workers: int
    warm: int = 0
    follows_demand: bool = False
    coordinator: tuple[str, ...] | None = None
    log_dir: Path | None = None


class Supervisor:
    """Runs one machine's part; `run` is called once.

    Args:
        settings: What to run.
        link: Reaches the coordinator.
        show: Takes lines to show.
    """

    def __init__(self, settings: SupervisorSettings, link: CoordinatorLink, show: Show) -> None:
        self._settings = settings
        self._link = link
        self._show = show = unfailing(show)
        self._pool = Pool(settings.pool, show, self._worker_exited)
        self._coordinator: CoordinatorProcess | None = None
        if settings.coordinator is not None and settings.log_dir is not None:
            self._coordinator = CoordinatorProcess(settings.coordinator, show, settings.log_dir, self._trains_here)
        self._status = Status()
        self._members: set[str] = set()  # of the newest world: their users' code may go on when training is over
        self._generation = -1
        self._heard_at = 0.0
        self._ask_now = asyncio.Event()
        self._verdict: int | None = None
        self._stop: str | None = None
        self._killed = asyncio.Event()
        self._aside: set[asyncio.Task[Any]] = set()

    async def run(self) -> int:
        """Run until the job is over, was stopped, or has failed; nothing that was started is left.

        Returns:
            0: complete; 75: stopped, to be resumed; 2: impossible settings; 1: failed; 130: killed by a second signal.
        """
        self._heard_at = asyncio.get_running_loop().time()
        self._handle_signals()
        working = asyncio.ensure_future(self._work())
        killed = asyncio.ensure_future(self._killed.wait())
        try:
            await asyncio.wait((working, killed), return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else EXIT_KILLED
        finally:
            await self._end(working, killed)

    async def _work(self) -> int:
        await self._pool.start()
        if self._coordinator is not None:
            self._do_aside(self._follow_coordinator(self._coordinator))
        self._do_aside(self._follow_status())
        self._pool.resize(self._settings.num_workers + self._settings.warm)
        while self._is_going_on:
            await self._pool.wait_for_change(_POLL_SECONDS)
            self._conclude_without_coordinator()
        if self._pool.failure is not None and self._verdict is None:
            self._show(self._pool.failure)
            self._conclude(EXIT_IMPOSSIBLE if self._pool.was_impossible else EXIT_FAILED)
        await self._dismiss()
        if self._verdict in (0, EXIT_STOPPED):
            for failure in self._pool.late_failures:
                self._show(f"training is over, but {failure}")
        return self._verdict or (EXIT_FAILED if self._pool.late_failures else 0)

    def _conclude(self, verdict: int) -> None:
        """End the job so, unless that is settled."""
        if self._verdict is None:
            self._verdict = verdict

    @property
    def _is_going_on(self) -> bool:
        return self._verdict is None and self._pool.failure is None

    def _trains_here(self) -> bool:
        """Whether workers of the newest known world live on this machine."""
        return not self._pool.workers.isdisjoint(self._members)

    # The coordinator.

    async def _follow_coordinator(self, coordinator: CoordinatorProcess) -> None:
        self._conclude(await coordinator.run())

    async def _follow_status(self) -> None:
        shown = ""
        while True:
            try:
                self._status = await self._link.status()
            except CoordinatorAway as error:
                if isinstance(error, CoordinatorElsewhere) and self._coordinator is None:
                    self._show(f"Error: {error}")
                    self._conclude(EXIT_IMPOSSIBLE)
                    return
                self._miss_coordinator()
            else:
                self._pool.hold(False)
                self._heard_at = asyncio.get_running_loop().time()
                self._take_status()
                shown = self._show_world(shown)
            await self._until_next_question()

    async def _until_next_question(self) -> None:
        if self._coordinator is not None:
            await asyncio.sleep(_POLL_SECONDS)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ask_now.wait(), _FAR_POLL_SECONDS * random.uniform(0.8, 1.2))
        self._ask_now.clear()

    def _miss_coordinator(self) -> None:
        if self._coordinator is not None:
            self._coordinator.unanswered()
            return
        # It may have gone with the end of the job, which its workers have heard: none is replaced now.
        self._pool.hold(True)
        # What is announced before it has ever answered may be of an earlier coordinator.
        if self._status and (ended := self._link.announced_end()) is not None:
            self._status["ended"] = ended
            self._pool.retire()

    def _take_status(self) -> None:
        position = self._status.position
        if (generation := self._status.get("generation", -1)) > self._generation:
            self._members, self._generation = set(), generation
        self._members |= self._status.members
        self._pool.progressed(position, self._members)
        if self._coordinator is not None:
            self._coordinator.answered(position)
        if self._status.is_over:
            self._pool.retire()
        elif self._settings.follows_demand and self._stop is None and self._is_going_on:
            self._pool.resize(self._status.wanted + self._settings.warm)

    def _show_world(self, shown: str) -> str:
        status = self._status
        line = f"generation {status.get('generation')}, {len(status.members)} workers: {status.get('reason')}"
        if self._coordinator is None and line != shown and status.get("phase") == "running":
            self._show(line)
            return line
        return shown

    def _worker_exited(self, worker: str) -> None:
        self._ask_now.set()  # the coordinator may end with the job, and then tells nobody
        self._do_aside(self._tell_exit(worker))

    async def _tell_exit(self, worker: str) -> None:
        try:
            await self._link.exited(worker)
        except CoordinatorAway:
            return  # it sees the connection end

    def _conclude_without_coordinator(self) -> None:
        """Where the coordinator runs elsewhere, this machine's part is over when its workers are and it says so."""
        codes = set(self._pool.codes.values())
        if self._coordinator is not None or not self._pool.is_empty or not codes:
            return
        away = asyncio.get_running_loop().time() - self._heard_at
        ended_well = codes <= {0, EXIT_STOPPED}
        if self._status.is_complete:
            self._conclude(0)
        elif self._status.is_over or self._stop is not None:
            self._conclude(EXIT_STOPPED)
        elif away > (_AWAY_SECONDS if ended_well else _HOPELESS_SECONDS):
            # Only a worker that heard of the job's end ends with 0.
            self._conclude(EXIT_FAILED if not ended_well else 0 if 0 in codes else EXIT_STOPPED)

    # The end.

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop is not None:
            self._killed.set()
            return
        self._stop = number.name
        self._pool.retire()
        self._show(f"{number.name}: stopping after the update under way, with a checkpoint; once more to kill")
        self._do_aside(self._ask_to_stop(number.name))

    async def _ask_to_stop(self, reason: str) -> None:
        if self._coordinator is not None:
            try:
                await self._link.stop(reason)
                await self._until_empty(None)
                await asyncio.sleep(_OUTSIDER_SECONDS)  # for the coordinator's own word
                self._conclude(EXIT_STOPPED)
            except CoordinatorAway:
                self._show("the coordinator is away: every worker is told to leave")
            else:
                return
        # All leave at one boundary, the last ones with a checkpoint.
        self._pool.signal(signal.SIGTERM)
        await self._until_empty(None)
        self._conclude(EXIT_STOPPED)

    async def _dismiss(self) -> None:
        """Let every worker end: at once, or when it is done where it takes part in the end of the run."""
        self._pool.retire()
        if self._verdict in (0, EXIT_STOPPED):
            await self._until_empty(_OUTSIDER_SECONDS)
            self._pool.signal(signal.SIGTERM, but=self._members)
            await self._wait_while(self._trains_here, None)
            await self._until_empty(_KILL_SECONDS)
        else:
            self._pool.signal(signal.SIGTERM)
            await self._until_empty(_KILL_SECONDS)
            if self._trains_here():
                self._show("workers may be saving their state, which is waited for; Ctrl-C twice kills them")
                await self._wait_while(self._trains_here, _SAVING_SECONDS)

    async def _until_empty(self, seconds: float | None) -> None:
        await self._wait_while(lambda: not self._pool.is_empty, seconds)

    async def _wait_while(self, condition: Callable[[], bool], seconds: float | None) -> None:
        """Wait for so long at most; None: as long as it takes."""
        loop = asyncio.get_running_loop()
        until = None if seconds is None else loop.time() + seconds
        while condition() and (until is None or loop.time() < until):
            await self._pool.wait_for_change(_POLL_SECONDS)

    async def _end(self, *tasks: asyncio.Task[Any]) -> None:
        for task in (*tasks, *self._aside):
            task.cancel()
        await self._pool.close()
        if self._coordinator is not None:
            await self._coordinator.end()
            self._coordinator.close()
        await asyncio.gather(*tasks, *self._aside, return_exceptions=True)
        await self._link.close()

    def _do_aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the rest, which cannot go on without it."""
        task = asyncio.ensure_future(work)
        self._aside.add(task)
        task.add_done_callback(self._did_aside)

    def _did_aside(self, task: asyncio.Task[Any]) -> None:
        self._aside.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an error that should not happen ends the job on this machine", exc_info=error)
            self._conclude(EXIT_FAILED)


def supervise(settings: SupervisorSettings, link: CoordinatorLink, show: Callable[[str], None]) -> int:
    """Run one machine's part of a job; see `Supervisor.run`."""

    async def run() -> int:
        return await Supervisor(settings, link, show).run()

    return asyncio.run(run())
