"""The coordinator's loop: after each event and 20 times a second it asks `decide`, until there is nothing to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from difflib import get_close_matches

from elastic_batch.coordinator import events
from elastic_batch.coordinator.connections import Connection
from elastic_batch.coordinator.decide import Wait, decide
from elastic_batch.coordinator.decisions import Decisions
from elastic_batch.coordinator.journal import JournalUnusable
from elastic_batch.coordinator.reception import Reception
from elastic_batch.coordinator.run import COMPLETE, Run
from elastic_batch.errors import NoWorkers
from elastic_batch.protocol import Leave, Stop

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.05
HOLD_UP_SECONDS = 1.0
"""A tick that comes so late means that this process was held up."""
SAVE_SECONDS = 1.0
"""Between two times that progress is written to the journal."""
GOODBYE_SECONDS = 30.0
"""How long a run that is over waits for workers outside the world to end."""
SAVING_SECONDS = 600.0
"""How long it waits for the world's workers, which may be saving the last checkpoint."""
_MOST_DECISIONS = 200
"""In one go; the rest comes after other events had their turn."""


class Service:
    """The coordinator of one run. Everything happens on one event loop; only `serve` waits.

    Args:
        run: The run, recovered from the journal.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._decisions = Decisions(run)
        self._reception = Reception(run, self._decisions)
        self._alive_at = self._saved_at = run.clock()
        self._step_is_due = False
        self._step_seconds = 0.0
        self._ended_at: float | None = None
        self._told_end = False
        self._over = -1
        self._complained_at = -float("inf")

    async def serve(self) -> str:
        """Drive the run until it is over and its workers are gone. Returns why it is over.

        Raises:
            NoWorkers: No world started in time.
        """
        started_at = self.run.clock()
        failure: NoWorkers | None = None
        while not self._is_done():
            self._tick()
            state, limit = self.run.state, self.run.membership.start
            if state.world is None and state.ended is None and self.run.clock() - started_at > limit:
                failure = NoWorkers(limit, self.run.reason)
                state.ended = f"stopped: {failure}"  # workers that wait are to hear of it
            await asyncio.sleep(TICK_SECONDS)
        if failure is not None:
            raise failure
        assert self.run.state.ended is not None
        return self.run.state.ended

    def hear(self, connection: Connection, text: str | bytes) -> None:
        """A worker said something."""
        if self._reception.hear(self._now(), connection, text):
            self._decide_soon()

    def gone(self, connection: Connection) -> None:
        """A connection ended."""
        self._reception.gone(self._now(), connection)
        self._decide_soon()
        # Until then it may be one of many that break at once; a tick would come up to its length too late.
        asyncio.get_running_loop().call_later(self.run.membership.settle + 0.001, self._decide_soon)

    def drain(self, name: str) -> str | None:
        """Ask a worker to leave at the next boundary. Returns why that is impossible, or None."""
        state = self.run.state
        if name not in state.workers:
            nearest = get_close_matches(name, state.workers, n=1, cutoff=0.4)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else "See them with: elastic-batch status"
            return f"there is no worker {name!r}. {hint}"
        events.leaving(state, name)
        self.run.connections.tell([name], Leave(reason="drained on request"))
        self._decide_soon()
        return None

    def exited(self, name: str) -> bool:
        """Whoever started a worker saw its process end. Returns whether the worker was still counted on."""
        state, now = self.run.state, self._now()
        was_known = name in state.workers
        if was_known and events.is_inside(state, name):
            self._decisions.rescale.noticed(now)
        events.exited(state, now, name, self.run.membership)
        self.run.connections.cut(name, 1000, "its process ended")
        self.run.store.forget(name)
        self._decide_soon()
        return was_known

    def stop(self, reason: str) -> None:
        """Ask all workers to stop after the same update; without a world the run ends at once."""
        run, state = self.run, self.run.state
        logger.info("the run is asked to stop: %s", reason)
        run.stop_reason = reason
        members = [worker.name for worker in events.inside(state)]
        if members:
            run.connections.tell(members, Stop(reason=reason))
        elif state.ended is None:
            state.ended = f"stopped: {reason}"
        self._decide_soon()

    def _now(self) -> float:
        """The time; notices when this process was held up, before anything is concluded from silence."""
        now = self.run.clock()
        if now - self._alive_at > HOLD_UP_SECONDS:
            logger.warning("this process was held up for %.1f s", now - self._alive_at)
            events.woke_late(self.run.state, now)
        self._alive_at = now
        return now

    def _tick(self) -> None:
        now = self._now()
        self.run.store.expire(now)
        self._reception.try_again(now)
        self._decide()
        self._decisions.write_down(now)
        if now - self._saved_at >= SAVE_SECONDS:
            self._saved_at = now
            self.save()

    def _decide_soon(self) -> None:
        """Ask `decide` when the events at hand are entered; with thousands of workers not more than half the time."""
        if not self._step_is_due:
            self._step_is_due = True
            asyncio.get_running_loop().call_later(self._step_seconds, self._decide)

    def _decide(self) -> None:
        self._step_is_due = False
        started = self._now()
        for _ in range(_MOST_DECISIONS):
            decision = decide(self._now(), self.run.state, self.run.rules)
            if not self._decisions.carry_out(self._now(), decision) or isinstance(decision, Wait):
                break
        else:
            self._decide_soon()
        self._watch_the_end()
        self._step_seconds = min(0.1, self.run.clock() - started)

    def _watch_the_end(self) -> None:
        """Note when nobody can be in the last world any more; tell those outside when the run is over."""
        run, state, world = self.run, self.run.state, self.run.state.world
        run.forget_the_gone()
        is_over = world is not None and (state.ended is not None or not events.unaccounted(world))
        if world is not None and world.generation > self._over and is_over:
            self._over = world.generation
            with contextlib.suppress(JournalUnusable):
                run.journal.world_is_over(world.generation)
        if run.is_concluding and state.ended is None and run.is_out_of_reach:
            state.ended = COMPLETE
        if run.stop_reason is not None and state.ended is None and not state.workers and run.is_out_of_reach:
            state.ended = f"stopped: {run.stop_reason}"
        if state.ended == COMPLETE and self._lead_waits():
            logger.info("the lead worker lost the others at the very end: it concludes in a world of its own")
            state.ended, run.is_concluding = None, True
            self._decide_soon()
        if state.ended is None:
            self._ended_at, self._told_end = None, False
            return
        if self._ended_at is None:
            self._ended_at = self._now()
        if not self._told_end:
            self._told_end = True
            logger.info("%s", state.ended)
            self._decisions.end(state.ended)

    def _lead_waits(self) -> bool:
        """Whether the newest world's first worker, whose user's code goes on after training, wants another world."""
        lead = events.lead(self.run.state)
        return lead is not None and lead.ready

    def _is_done(self) -> bool:
        if self._ended_at is None or not self._told_end:
            return False
        connected, waited = self.run.connections.names(), self._now() - self._ended_at
        if any(events.is_inside(self.run.state, name) for name in connected):
            return waited > SAVING_SECONDS
        return not connected or waited > GOODBYE_SECONDS

    def save(self) -> None:
        """Let progress survive this process; a full disk is complained of once a minute."""
        self._decisions.write_down()
        try:
            self.run.save_progress()
        except JournalUnusable as error:
            if self._now() - self._complained_at > 60:
                self._complained_at = self._now()
                logger.error("%s", error)
