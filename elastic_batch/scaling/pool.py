"""A pool of worker processes on this machine: as many as are wanted, each one replaced when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_batch.scaling.nursery import PRELOADED, Birth, worker_name
from elastic_batch.scaling.nursery_link import NurseryLink
from elastic_batch.scaling.output import OutputLog, Show
from elastic_batch.scaling.processes import read_output
from elastic_batch.scaling.restarts import EXIT_IMPOSSIBLE, EXIT_STOPPED, Restarts

_MAX_LOST_NURSERIES = 3
_LAST_OUTPUT_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What every worker runs.

    Args:
        script: A Python file; None: the package's own command line.
        arguments: What follows the program's name.
    """

    script: str | None
    arguments: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """How workers are run.

    Args:
        program: What they run.
        slots: Names of the places for workers, in the order in which they are filled.
        environ: What all workers' environments hold.
        slot_environ: Variables of each slot's own.
        slot_variable: The variable that tells a worker its slot.
        name_variable: The variable that tells it its name.
        later_variable: The variable that tells those which start when the job has made progress that it has.
        log_dir: Where output is kept; None: nowhere.
        modules: What is imported before workers are forked.
    """

    program: Program
    slots: Sequence[str]
    environ: Mapping[str, str]
    slot_environ: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    slot_variable: str
    name_variable: str
    later_variable: str
    log_dir: Path | None
    modules: Sequence[str] = PRELOADED


@dataclass(slots=True)
class _Slot:
    """A place for one worker; `busy` from the request for a process to its end."""

    name: str
    log: OutputLog
    busy: bool = False
    pid: int | None = None
    is_signalled: bool = False
    born_at: float = 0.0
    restarts: Restarts = field(default_factory=Restarts)
    starts_at: float = 0.0


class Pool:
    """Keeps as many workers as it is told; for one event loop, from `start` to `close`.

    Args:
        settings: How workers are run.
        show: Takes lines to show.
        on_exit: Is told the name of each worker whose process has ended.

    Attributes:
        failure: Why the job cannot go on, once a worker, or what starts them, has failed for good.
        was_impossible: Whether that is because its settings are impossible.
        codes: Exit code of the last process of each slot.
        late_failures: Of workers that nobody would have started again: what they were and how they ended.
    """

    def __init__(self, settings: PoolSettings, show: Show, on_exit: Callable[[str], None]) -> None:
        self.failure: str | None = None
        self.was_impossible = False
        self.codes: dict[str, int] = {}
        self.late_failures: list[str] = []
        self._settings = settings
        self._show = show
        self._on_exit = on_exit
        self._size = 0
        self._position: int | None = None
        self._has_progress = self._has_trained = False
        self._held = False
        self._lost_nurseries = 0
        self._changed = asyncio.Event()
        self._readers: set[asyncio.Task[None]] = set()
        self._restarting: set[asyncio.Task[None]] = set()
        self._nursery = NurseryLink(self, settings.environ, settings.modules)
        self._slots = {
            slot: _Slot(slot, OutputLog(slot, show, settings.log_dir / f"{slot}.log" if settings.log_dir else None))
            for slot in settings.slots
        }

    async def start(self) -> None:
        """Start importing; workers come with `resize`."""
        await self._nursery.start()

    def resize(self, num_workers: int) -> None:
        """Have at least so many workers, as far as there are slots. A pool does not shrink: who is not wanted stands
        by, ready for the next time."""
        self._size = max(self._size, min(num_workers, len(self._slots)))
        self._fill()

    def progressed(self, position: int, members: Collection[str]) -> None:
        """The job has committed so many samples; `members` are in its world."""
        self._has_trained = self._has_trained or not self.workers.isdisjoint(members)
        if position != self._position:
            self._has_progress = self._position is not None
            self._position, self._lost_nurseries = position, 0

    def hold(self, held: bool) -> None:
        """Whether nothing is started for now."""
        self._held = held

    def retire(self) -> None:
        """Start nothing any more."""
        self._size = 0

    @property
    def workers(self) -> set[str]:
        """Names of the workers whose processes live."""
        return {worker_name(slot.pid, slot.name) for slot in self._slots.values() if slot.pid is not None}

    @property
    def is_empty(self) -> bool:
        """Whether no process lives or is being started."""
        return not any(slot.busy for slot in self._slots.values())

    def signal(self, number: signal.Signals, *, but: Collection[str] = ()) -> None:
        """Send a signal to the workers whose names are not in `but`."""
        for slot in self._slots.values():
            if slot.busy and (slot.pid is None or worker_name(slot.pid, slot.name) not in but):
                slot.is_signalled = True
                self._nursery.signal(slot.name, number)

    async def wait_for_change(self, seconds: float) -> None:
        """Return when a process has ended, or after so many seconds; start what is due."""
        now = asyncio.get_running_loop().time()
        due = [] if self._restarting or self._held else [max(0.0, slot.starts_at - now) for slot in self._missing()]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), min([seconds, *due]))
        self._changed.clear()
        self._fill()

    async def close(self) -> None:
        """Kill what lives, show what was printed, give everything back."""
        self.retire()
        for task in self._restarting:
            task.cancel()
        await asyncio.gather(*self._restarting, return_exceptions=True)
        await self._nursery.close()
        if self._readers:
            # Something that a worker has left behind may hold its output open.
            _, late = await asyncio.wait(self._readers, timeout=_LAST_OUTPUT_SECONDS)
            for reader in late:
                reader.cancel()
        for slot in self._slots.values():
            slot.log.close()

    # What the nursery tells.

    def started(self, slot: str, pid: int) -> None:
        place = self._slots[slot]
        place.pid, place.born_at = pid, asyncio.get_running_loop().time()

    def ended(self, slot: str, pid: int, code: int) -> None:
        place = self._slots[slot]
        place.busy, place.pid = False, None
        self.codes[slot] = code
        self._on_exit(worker_name(pid, slot))
        lived_seconds = asyncio.get_running_loop().time() - place.born_at
        delay = place.restarts.ended(code, self._position or 0, lived_seconds, has_trained=self._has_trained)
        if self._size:
            self._judge(place, code, delay)
        elif code not in (0, EXIT_STOPPED) and not (code < 0 and place.is_signalled):
            self.late_failures.append(f"{slot} {_how(code)}")
        self._changed.set()

    def nursery_lost(self) -> None:
        for slot in [slot for slot in self._slots.values() if slot.busy]:
            pid, slot.busy, slot.pid = slot.pid, False, None
            if pid is not None:
                self._on_exit(worker_name(pid, slot.name))
        self._changed.set()
        if not self._size:
            return
        self._lost_nurseries += 1
        if self._lost_nurseries > _MAX_LOST_NURSERIES:
            self.failure = "the process that starts workers ends again and again; what it printed is above"
            self.retire()
            return
        self._show("the process that starts workers was lost, and they with it; starting them again")
        self._keep(self._restarting, self._start_nursery_again(), self._nursery_not_started)

    # Inside.

    @staticmethod
    def _keep(
        tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], failed: Callable[[BaseException], None]
    ) -> None:
        """Run something aside; the loop itself would forget it, and how it ended."""

        def done(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                failed(error)

        task = asyncio.ensure_future(work)
        tasks.add(task)
        task.add_done_callback(done)

    async def _start_nursery_again(self) -> None:
        await asyncio.sleep(self._lost_nurseries - 1)  # what the machine is short of may come back
        await self._nursery.start()

    def _nursery_not_started(self, error: BaseException) -> None:
        self._show(f"the process that starts workers cannot be started: {error}")
        self.nursery_lost()

    def _missing(self) -> list[_Slot]:
        return [slot for slot in list(self._slots.values())[: self._size] if not slot.busy]

    def _fill(self) -> None:
        if self._restarting or self._held:
            return
        now = asyncio.get_running_loop().time()
        for slot in self._missing():
            if slot.starts_at <= now:
                self._start_worker(slot)

    def _start_worker(self, slot: _Slot) -> None:
        settings = self._settings
        program = settings.program
        later = {settings.later_variable: "1"} if self._has_progress else {}
        ours, theirs = os.pipe()
        birth = Birth(
            slot=slot.name,
            script=program.script,
            arguments=list(program.arguments),
            environ={**settings.slot_environ.get(slot.name, {}), settings.slot_variable: slot.name, **later},
            name_variable=settings.name_variable,
        )
        slot.log.last_lines.clear()
        self._nursery.bear(birth, theirs)
        os.close(theirs)
        slot.busy, slot.is_signalled = True, False
        self._keep(self._readers, self._follow(slot, ours), lambda error: self._unread(slot, error))

    async def _follow(self, slot: _Slot, descriptor: int) -> None:
        await read_output(descriptor, slot.log.take)
        slot.log.end_line()

    def _unread(self, slot: _Slot, error: BaseException) -> None:
        self._show(f"what {slot.name} prints is lost from now on: {error}")

    def _judge(self, slot: _Slot, code: int, delay: float | None) -> None:
        """Say how a worker ended that was still wanted, and when it is started again."""
        if delay is None:
            # What it printed last may still be in the pipe.
            asyncio.get_running_loop().call_later(0.1, self._give_up, slot, code)
            slot.starts_at = float("inf")
            return
        slot.starts_at = asyncio.get_running_loop().time() + delay
        if code not in (0, EXIT_STOPPED):
            self._show(f"{slot.name} {_how(code)}; starting it again" + (f" in {delay:.1f} s" if delay else ""))

    def _give_up(self, slot: _Slot, code: int) -> None:
        self.was_impossible = code == EXIT_IMPOSSIBLE and not self._has_trained
        self.failure = f"{slot.name} {_how(code)}"
        if self.was_impossible:
            self.failure += ": it would do so again, for what it printed is wrong with its settings"
        else:
            lines = "\n".join(f"  {line}" for line in slot.log.last_lines)
            self.failure += f", as often before, and nothing was trained meanwhile. What it printed last:\n{lines}"
        self._changed.set()


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
