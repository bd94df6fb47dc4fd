"""Carries decisions out: tells the workers, writes the journal first where that matters, enters what was done."""

from __future__ import annotations

import logging
import time

from elastic_batch.coordinator import events, journal
from elastic_batch.coordinator.admission import out_of_reach, refuse
from elastic_batch.coordinator.decide import AskRegroup, Decision, EndWorld, FormWorld, Wait
from elastic_batch.coordinator.journal import JournalUnusable
from elastic_batch.coordinator.losses import Doubt, Evict, LoseSight, RegainSight
from elastic_batch.coordinator.metrics import Cause
from elastic_batch.coordinator.rendezvous import Store
from elastic_batch.coordinator.rescale import Rescale
from elastic_batch.coordinator.run import Run
from elastic_batch.coordinator.state import Phase
from elastic_batch.failpoints import reach
from elastic_batch.protocol import Abort, End, Form, Probe, Regroup, Stop, is_loopback

logger = logging.getLogger(__name__)

EVICTED = 4000
"""WebSocket closing code: the worker was given up; it may come back as a new one."""
_WRITE_SECONDS = 1.0
"""How long a decision may wait to be written down."""


class Decisions:
    """What `decide` says, done.

    Args:
        run: What they act on.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.rescale = Rescale()
        self._unwritten: list[journal.Decision] = []
        self._write_by = 0.0

    def carry_out(self, now: float, decision: Decision) -> bool:
        """Do it. Returns False where the disk did not take it: it is as if it had not been made, and comes again."""
        if not isinstance(decision, Wait):
            reach("coordinator.decision")
        match decision:
            case Evict():
                self._evict(now, decision)
            case Doubt():
                self._doubt(now, decision)
            case LoseSight():
                logger.warning("%s: they are waited for", decision.reason)
                events.sight_lost(self._run.state)
                self._note_decision("lose sight", decision.reason)
            case RegainSight():
                events.sight_regained(self._run.state)
                self._note_decision("regain sight", decision.reason)
            case EndWorld():
                self._end_world(now, decision)
            case AskRegroup():
                self._ask_regroup(now, decision)
            case FormWorld():
                return self._form_world(now, decision)
            case Wait():
                self._note(decision.reason)
        return True

    def entered(self, now: float) -> None:
        """A worker is in the world; with the last one the change is over, and the journal knows who has the state."""
        run, world = self._run, self._run.state.world
        if world is not None and world.phase is Phase.RUNNING and self.rescale.is_forming:
            cause, seconds = self.rescale.trains(now)
            run.metrics.rescaled(cause, seconds)
            logger.info("generation %d trains with %d workers", world.generation, len(world.members))
            try:
                run.journal.keep("holders", sorted(run.state.holders), durable=False)
            except JournalUnusable as error:
                logger.error("%s", error)

    def end(self, reason: str) -> None:
        """The run is over: workers that wait for a world end; those in one know it themselves and are left alone."""
        run, state = self._run, self._run.state
        waiting = [
            name for name in run.connections.names() if not events.is_inside(state, name) or state.workers[name].ready
        ]
        run.connections.tell(waiting, End(reason=reason))
        self._note_decision("end", reason)

    def write_down(self, now: float | None = None) -> None:
        """Bring what was decided to the disk.

        Args:
            now: Seconds; until a change of the world is over, or for a second, it waits: workers should not wait for
                the disk. None: at once.
        """
        if not self._unwritten or (now is not None and self.rescale.is_under_way and now < self._write_by):
            return
        decisions, self._unwritten = self._unwritten, []
        try:
            self._run.journal.decided(decisions)
        except JournalUnusable as error:
            logger.error("%s", error)

    def _evict(self, now: float, decision: Evict) -> None:
        run, state = self._run, self._run.state
        logger.warning("%s", decision.reason)
        if len(decision.workers) > 1:
            logger.info("given up together: %s", ", ".join(decision.workers))
        inner = [state.workers[name] for name in decision.workers if events.is_inside(state, name)]
        for worker in inner:
            self.rescale.noticed(worker.heard_at if worker.connected else worker.disconnected_at)
        events.lost(state, now, decision.workers, run.membership)
        reason = decision.reason if len(decision.workers) == 1 else "given up together with others"
        for name in decision.workers:
            run.connections.cut(name, EVICTED, reason)
            run.store.forget(name)
        if inner and not events.inside(state):
            self.rescale.decided(now, "loss")  # nobody is left to be told
        self._note_decision("evict", decision.reason)

    def _doubt(self, now: float, decision: Doubt) -> None:
        run, world = self._run, self._run.state.world
        assert world is not None
        logger.info("%s", decision.reason)
        run.connections.tell(world.members, Probe(generation=world.generation))
        events.doubted(run.state, now, decision.workers)

    def _end_world(self, now: float, decision: EndWorld) -> None:
        run, world = self._run, self._run.state.world
        assert world is not None
        logger.warning("generation %d is over: %s", world.generation, decision.reason)
        run.connections.tell(world.members, Abort(generation=world.generation, reason=decision.reason))
        run.store.withdraw(f"generation {world.generation} is over: {decision.reason}")
        events.world_ended(run.state, now)
        self.rescale.decided(now, "loss")
        self._note_decision("end world", decision.reason)

    def _ask_regroup(self, now: float, decision: AskRegroup) -> None:
        run, world = self._run, self._run.state.world
        assert world is not None
        logger.info("generation %d is asked to regroup: %s", world.generation, decision.reason)
        run.connections.tell(world.members, Regroup(generation=world.generation, reason=decision.reason))
        events.regroup_asked(run.state, decision.reason)
        self.rescale.decided(now, None)
        self._note_decision("regroup", decision.reason)

    def _form_world(self, now: float, decision: FormWorld) -> bool:
        run, state = self._run, self._run.state
        if self._refuse_unreachable(decision.members):
            return True
        if not any(events.is_inside(state, name) for name in decision.members):
            state.generation = max(state.generation, run.newest_writer)
        generation = state.generation + 1
        try:
            run.journal.begin_world(generation, [run.member(name) for name in decision.members], decision.reason)
        except JournalUnusable as error:
            # Were the number not on the disk, a restarted coordinator could give it to another world.
            self._note(f"generation {generation} waits: {error}")
            return False
        reach("coordinator.form")
        self.rescale.forms(now, self._cause(decision))
        run.store.withdraw(f"generation {run.store.generation} is over")
        run.store = Store(generation)
        events.world_announced(state, now, decision.members)
        all_on_loopback = all(is_loopback(run.member(name).address) for name in decision.members)
        seconds = run.membership.form
        form = Form(generation=generation, members=decision.members, all_on_loopback=all_on_loopback, seconds=seconds)
        run.connections.tell(decision.members, form)
        if run.stop_reason is not None:
            run.connections.tell(decision.members, Stop(reason=run.stop_reason))
        logger.info("generation %d forms: %s", generation, decision.reason)
        self._note_decision("form world", decision.reason)
        return True

    def _cause(self, decision: FormWorld) -> Cause:
        world = self._run.state.world
        if world is None:
            return "start"
        before, after = set(world.members), set(decision.members)
        if after - before:
            return "join"
        if before - after:
            return "leave" if world.left else "shrink"
        return "retry"

    def _refuse_unreachable(self, members: tuple[str, ...]) -> bool:
        """Refuse the newcomers that cannot be in a world with its first worker. Returns whether there are any."""
        run = self._run
        reasons = {name: reason for name in members if (reason := out_of_reach(run, name, members[0])) is not None}
        for name, reason in reasons.items():
            connection = run.connections.get(name)
            assert connection is not None, "it waits for a world"
            refuse(run, connection, name, reason)
        return bool(reasons)

    def _note(self, reason: str) -> None:
        if reason != self._run.reason:
            self._run.reason = reason
            logger.info("%s", reason)

    def _note_decision(self, kind: str, reason: str) -> None:
        self._run.reason = reason
        if not self._unwritten:
            self._write_by = self._run.clock() + _WRITE_SECONDS
        self._unwritten.append(journal.Decision(time.time(), self._run.state.generation, kind, reason))
