"""What the coordinator's parts share about the one run that it serves."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic_batch.coordinator import events
from elastic_batch.coordinator.connections import Connections
from elastic_batch.coordinator.journal import Journal, Member
from elastic_batch.coordinator.metrics import WorldMetrics
from elastic_batch.coordinator.rendezvous import Store
from elastic_batch.coordinator.state import MembershipConfig, Phase, State, Worker, World
from elastic_batch.protocol import Hello

COMPLETE = "the job is complete"
_MEDIAN_OF = 51


@dataclass(slots=True)
class Run:
    """The run and everything known of it.

    Attributes:
        run_id: Its name.
        is_new: Whether the name was made by this process, and no worker has heard it.
        directory: The run's directory, for messages.
        membership: How membership is decided.
        state: What decisions are made of.
        journal: What outlives this process.
        connections: The workers' connections.
        metrics: What Prometheus reads.
        store: Through which the newest world's workers find each other.
        members: Name -> what the newest world's workers and all connected ones said of themselves.
        record: The newest update's line in the metrics log.
        job: What alters the trajectory, as the first worker said; None: nobody has.
        stop_reason: Why the whole run is asked to stop; None: it is not.
        is_concluding: Whether the job was complete, and its lead worker needs one more world to hear of it.
        newest_writer: The newest generation that has written checkpoints of this run, as workers found it; -1: none.
        reason: Why things stand as they do.
        announce: Writes `coordinator.json`.
        clock: Monotonic seconds.
        started_at: When this process took the run up.
    """

    run_id: str
    is_new: bool
    directory: Path
    membership: MembershipConfig
    journal: Journal
    metrics: WorldMetrics
    state: State = field(default_factory=State)
    connections: Connections = field(default_factory=Connections)
    store: Store = field(default_factory=lambda: Store(0))
    members: dict[str, Member] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] | None = None
    stop_reason: str | None = None
    is_concluding: bool = False
    newest_writer: int = -1
    reason: str = "no worker yet"
    announce: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    started_at: float = 0.0
    _update_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MEDIAN_OF))

    @property
    def rules(self) -> MembershipConfig:
        """How membership is decided now: to stop or conclude a run, any workers will do."""
        is_ending = self.is_concluding or self.stop_reason is not None
        return replace(self.membership, min_workers=1) if is_ending else self.membership

    @property
    def is_out_of_reach(self) -> bool:
        """Whether nobody is in the last world any more, or all of it has been out of sight for long."""
        state = self.state
        if state.world is None or not events.unaccounted(state.world):
            return True
        return not events.inside(state) and self.clock() - state.seen_at >= self.membership.orphan_grace

    def recover(self) -> None:
        """Take up what the journal knows: the newest world counts as running, its workers as about to reconnect.

        Whether it came to run is not forgotten: whoever was to join it may not have the state.
        """
        now = self.started_at = self.clock()
        state = self.state
        state.generation, members, is_over = self.journal.last_world()
        self.job = self.journal.fact("job")
        self.record = self.journal.fact("record") or {}
        self.metrics.resume(self.journal.fact("counters") or {}, self.record)
        state.num_micro_batches = int(self.record.get("num_micro_batches", 0))
        if is_over:
            return
        names = tuple(member.name for member in members)
        state.world = World(state.generation, names, Phase.RUNNING, now, out_of_sight=True)
        state.holders = set(self.journal.fact("holders") or ())
        for member in members:
            self.members[member.name] = member
            state.workers[member.name] = Worker(
                member.name, member.slot, connected=False, disconnected_at=now, generation=state.generation
            )

    def rename(self, run_id: str) -> None:
        """Take the name that a worker knows the run by; all that this process knew of it was lost."""
        self.run_id, self.is_new = run_id, False
        self.journal.keep("run_id", run_id)
        self.announce()

    def met(self, hello: Hello) -> None:
        """Note what a worker says of itself."""
        self.members[hello.worker] = Member(hello.worker, hello.slot, hello.host, hello.pid, hello.address)

    def member(self, name: str) -> Member:
        """What is known of a worker."""
        return self.members.get(name) or Member(name, name, "", 0)

    def forget_the_gone(self) -> None:
        """Keep what workers said of themselves only for those that matter."""
        if len(self.members) <= 2 * len(self.state.workers) + 16:
            return
        kept = self.state.workers.keys() | set(self.state.world.members if self.state.world else ())
        self.members = {name: member for name, member in self.members.items() if name in kept}

    def take(self, record: dict[str, Any], skipped: int) -> None:
        """Note what the lead worker reports: the newest update, with how many were skipped since the last one, or more.

        Raises:
            KeyError, TypeError, ValueError: The record is not as it should be.
        """
        if record["kind"] != "update":
            self.metrics.happened(record)
            return
        self.record = record
        seconds = record.get("seconds")
        if isinstance(seconds, int | float):
            self._update_seconds.append(seconds)
            self.state.median_update = statistics.median(self._update_seconds)
        self.metrics.take(record, skipped)

    def save_progress(self) -> None:
        """Let progress survive this process.

        Raises:
            JournalUnusable: The disk is full, say.
        """
        if self.record:
            self.journal.keep("record", self.record, durable=False)
            self.journal.keep("counters", self.metrics.totals, durable=False)
