"""Hears what workers say and enters it into the run."""

from __future__ import annotations

import json
import logging

from elastic_batch.coordinator import events
from elastic_batch.coordinator.admission import (
    admit,
    may_be_the_same_later,
    out_of_reach,
    refuse,
    same_job,
    speaks_another_version,
)
from elastic_batch.coordinator.connections import Connection
from elastic_batch.coordinator.decisions import Decisions
from elastic_batch.coordinator.journal import JournalUnusable
from elastic_batch.coordinator.run import COMPLETE, Run
from elastic_batch.protocol import (
    Abort,
    Beat,
    Bye,
    End,
    Entered,
    FromWorker,
    Hello,
    Leave,
    Leaving,
    Progress,
    Ready,
    Stop,
    StoreReply,
    StoreRequest,
    Welcome,
    parse_from_worker,
)

logger = logging.getLogger(__name__)

BAD_MESSAGE, DONE = 1008, 1000
"""WebSocket closing codes."""


class Reception:
    """Takes in messages and the ends of connections.

    Args:
        run: What they are entered into.
        decisions: Hears of worlds that were entered and of the end.
    """

    def __init__(self, run: Run, decisions: Decisions) -> None:
        self._run = run
        self._decisions = decisions
        self._postponed: dict[str, Ready] = {}

    def hear(self, now: float, connection: Connection, text: str | bytes) -> bool:
        """Take in a message. Returns whether something may have to be decided now."""
        if connection.is_closing:
            return False
        try:
            message = parse_from_worker(text)
        except ValueError as error:
            self._not_understood(connection, text, error)
            return True
        if isinstance(message, Hello):
            self._hello(now, connection, message)
            return True
        if connection.hello is None:
            connection.close(BAD_MESSAGE, "the first message must be hello")
            return False
        return self._enter(now, connection, connection.hello.worker, message)

    def try_again(self, now: float) -> None:
        """Hear those once more that said they are ready too early to be judged."""
        postponed, self._postponed = self._postponed, {}
        for name, ready in postponed.items():
            if (connection := self._run.connections.get(name)) is not None:
                self._ready(now, connection, name, ready)

    def gone(self, now: float, connection: Connection) -> None:
        """A connection ended, for whatever reason."""
        if connection.hello is None:
            return
        name = connection.hello.worker
        if self._run.connections.remove(name, connection):
            events.disconnected(self._run.state, now, name)
            self._run.store.forget(name)

    def _enter(self, now: float, connection: Connection, name: str, message: FromWorker) -> bool:
        state = self._run.state
        match message:
            case Beat():
                connection.position = message.position
                before = state.num_micro_batches
                events.beat(
                    state,
                    now,
                    name,
                    stage=message.stage,
                    update=message.update,
                    busy=message.busy_seconds,
                    num_micro_batches=message.num_micro_batches,
                )
                return state.num_micro_batches != before
            case Progress():
                self._progress(name, message)
                return False
            case StoreRequest():
                self._ask_store(now, connection, name, message)
                return False
            case Ready():
                self._ready(now, connection, name, message)
            case Entered():
                self._decisions.rescale.synced(message.sync_seconds)
                events.entered(state, now, name, message.generation)
                self._decisions.entered(now)
            case Leaving():
                events.leaving(state, name)
            case Bye():
                self._bye(now, connection, name, message)
        return True

    def _hello(self, now: float, connection: Connection, hello: Hello) -> None:
        run, state = self._run, self._run.state
        if connection.hello is not None:
            connection.close(BAD_MESSAGE, "hello comes once")
            return
        if (refusal := admit(run, hello)) is not None:
            refuse(run, connection, hello.worker, refusal)
            return
        connection.hello = hello
        run.is_new = False
        before = state.generation
        goes_on = events.hello(state, now, hello.worker, hello.slot, hello.generation, hello.members)
        run.connections.add(hello.worker, connection)
        run.met(hello)
        if state.generation > before:
            self._adopted(hello)
        logger.info("worker %s on %s connected", hello.worker, hello.host)
        run.connections.tell([hello.worker], self._welcome())
        self._bring_up_to_date(hello, goes_on)

    def _welcome(self) -> Welcome:
        run = self._run
        return Welcome(run_id=run.run_id, beat_seconds=run.membership.beat, generation=run.state.generation)

    def _bring_up_to_date(self, hello: Hello, goes_on: bool) -> None:
        """Say again what a worker must know and may have missed."""
        run, world, name = self._run, self._run.state.world, hello.worker
        is_of_the_newest = world is not None and hello.generation == world.generation
        if not goes_on:
            reason = run.reason if is_of_the_newest else f"generation {run.state.generation} has taken over"
            run.connections.tell([name], Abort(generation=hello.generation, reason=reason))
        elif is_of_the_newest and run.stop_reason is not None:
            run.connections.tell([name], Stop(reason=run.stop_reason))
        if run.state.workers[name].leaving:
            run.connections.tell([name], Leave(reason="drained on request"))
        if run.state.ended is not None and not events.is_inside(run.state, name):
            run.connections.tell([name], End(reason=run.state.ended))

    def _adopted(self, hello: Hello) -> None:
        """The journal does not know the world that a worker is in: enter it."""
        run = self._run
        reason = f"found running: worker {hello.worker} is in it"
        logger.warning("generation %d %s", run.state.generation, reason)
        try:
            run.journal.begin_world(run.state.generation, [run.member(name) for name in hello.members], reason)
        except JournalUnusable as error:
            logger.error("%s", error)

    def _ready(self, now: float, connection: Connection, name: str, ready: Ready) -> None:
        run = self._run
        if ready.job and (refusal := same_job(run, ready.job)) is not None:
            if may_be_the_same_later(run, ready.job):
                self._postponed[name] = ready
            else:
                refuse(run, connection, name, refusal)
            return
        lead = events.lead(run.state)
        if lead is not None and lead.connected and (refusal := out_of_reach(run, name, lead.name)) is not None:
            refuse(run, connection, name, refusal)
            return
        if events.is_inside(run.state, name) and ready.broken:
            self._decisions.rescale.noticed(now)
        run.newest_writer = max(run.newest_writer, ready.newest_writer)
        events.ready(
            run.state, now, name, after=ready.after, broken=ready.broken, num_micro_batches=ready.num_micro_batches
        )
        needs_a_world = run.state.ended == COMPLETE and lead is not None and lead.name == name
        if run.state.ended is not None and not needs_a_world:
            run.connections.tell([name], End(reason=run.state.ended))

    def _progress(self, name: str, progress: Progress) -> None:
        state = self._run.state
        if progress.generation == state.generation and events.is_inside(state, name):
            try:
                self._run.take(progress.record, progress.skipped)
            except (KeyError, TypeError, ValueError) as error:
                logger.warning("worker %s reports something that is not as it should be: %r", name, error)

    def _ask_store(self, now: float, connection: Connection, name: str, request: StoreRequest) -> None:
        def reply(answer: StoreReply) -> None:
            connection.send(answer.model_dump_json())

        self._run.store.ask(now, name, request, reply)

    def _bye(self, now: float, connection: Connection, name: str, bye: Bye) -> None:
        run, state = self._run, self._run.state
        is_member = events.is_inside(state, name)
        logger.info("worker %s ends: %s", name, bye.text or bye.reason)
        if bye.reason == "failed":
            self._decisions.rescale.noticed(now)
            events.exited(state, now, name, run.membership)
        else:
            events.left(state, now, name)
        run.connections.remove(name, connection)
        run.store.forget(name)
        connection.close(DONE, "goodbye")
        if is_member and bye.reason == "finished":
            state.ended = state.ended or COMPLETE
        elif is_member and bye.reason == "stopped" and state.ended is None:
            state.ended = f"stopped: {bye.text or run.stop_reason or 'a worker asked for it'}"

    def _not_understood(self, connection: Connection, text: str | bytes, error: ValueError) -> None:
        """A worker of another version says things that this one does not know; it is told so in its own hello."""
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        if connection.hello is None and isinstance(said, dict) and (reason := speaks_another_version(said)):
            refuse(self._run, connection, str(said.get("worker", "?"))[:300], reason)
            return
        logger.warning("a message was not understood: %s", str(error).replace("\n", " ")[:300])
        connection.close(BAD_MESSAGE, "a message was not understood")
