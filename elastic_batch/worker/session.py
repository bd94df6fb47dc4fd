"""A worker's session with the coordinator, as the trainer's membership: it hears of worlds and forms them."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from elastic_batch.engines import DistributedEngine, Engine, Formation, SoloEngine, Standing, Wishes
from elastic_batch.errors import InvalidSetting, LeftWorld, NoCoordinator, Refusal, WorldBroken
from elastic_batch.failpoints import reach
from elastic_batch.protocol import (
    Abort,
    Beat,
    Bye,
    End,
    Entered,
    Form,
    FromCoordinator,
    Leave,
    Leaving,
    Probe,
    Progress,
    Ready,
    Refused,
    Regroup,
    Stop,
    StoreReply,
    Welcome,
    is_loopback,
)
from elastic_batch.worker.connection import Connection
from elastic_batch.worker.credentials import Credentials
from elastic_batch.worker.store import SessionStore

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.1
"""Between two reports of progress, unless the next update asks for another number of workers."""
_FIRST_PATIENCE_SECONDS, _PATIENCE_SECONDS = 2.0, 30.0
"""After how long a wait says that it still waits, and how often from then on."""
_AWAY_SECONDS = 1800.0
"""A worker that waits for a world gives up when there was no coordinator for so long."""


class Session:
    """One worker's membership in an elastic job.

    The training thread calls the methods of `Membership`; what the coordinator says arrives on the connection's thread.

    Args:
        credentials: Where the coordinator is, and who this worker is.
        device: Where the model lives.
    """

    is_elastic = True

    def __init__(self, credentials: Credentials, device: torch.device) -> None:
        self.goes_on = credentials.goes_on
        self._device = device
        self._standing = Standing()
        self._changed = threading.Condition()
        self._engine: Engine | Formation | None = None
        self._generation = -1
        self._members: tuple[str, ...] = ()
        self._entered = -1
        self._formed_at = 0.0
        self._ready: Ready | None = None  # while this worker waits for a world
        self._form: Form | None = None
        self._over = -1  # the newest generation known to be over
        self._regroup = -1
        self._leaves: str | None = None
        self._stops: str | None = None
        self._end: str | None = None
        self._refused: str | None = None
        self._job: dict[str, Any] = {}
        self._progress_at = 0.0
        self._skipped = 0
        self._progress_micro_batches = 0
        self._credentials = credentials
        self._connection = Connection(credentials, self)
        atexit.register(self.close)

    # What the trainer asks.

    def first(self, standing: Standing, job: Mapping[str, Any]) -> Engine:
        self._standing, self._job = standing, dict(job)
        self._connection.start()
        return self._await_world(broken=False)

    def next(self, ended: Engine, *, broken: bool) -> Engine:
        return self._await_world(broken=broken)

    def entered(self, engine: Engine) -> None:
        with self._changed:
            self._entered = engine.generation
        seconds = time.monotonic() - self._formed_at
        self._connection.send(Entered(generation=engine.generation, sync_seconds=seconds))

    def wishes(self) -> Wishes:
        return Wishes(leave=self._leaves is not None, regroup=self._regroup >= self._generation, stop=self._stops)

    def leave(self) -> bool:
        with self._changed:
            self._leaves = "this worker was told to end"
            self._changed.notify_all()
        self._connection.send(Leaving())
        return True

    def progress(self, record: Mapping[str, Any]) -> None:
        if record["kind"] != "update":
            self._connection.send(Progress(generation=self._generation, record=dict(record)))
            return
        now = time.monotonic()
        wanted = self._standing.num_micro_batches
        self._skipped += record["skipped"]
        if wanted == self._progress_micro_batches and now - self._progress_at < _PROGRESS_SECONDS:
            return
        self._progress_at, self._progress_micro_batches = now, wanted
        # The beat says how many micro-batches come next: at a milestone the coordinator recruits at once.
        skipped, self._skipped = self._skipped, 0
        self._connection.send(self.beat(), Progress(generation=self._generation, record=dict(record), skipped=skipped))

    def close(self) -> None:
        atexit.unregister(self.close)
        self._connection.close(Bye(reason=self._standing.ended or "failed"))

    # What the connection asks, on its thread.

    @property
    def world(self) -> tuple[int, tuple[str, ...]]:
        """Generation and workers of the world that this worker is in, or waits after."""
        return self._generation, self._members

    @property
    def is_ending(self) -> bool:
        """Whether this worker's part in the run is over."""
        return self._standing.ended is not None

    def pending(self) -> list[Ready | Leaving | Entered]:
        """What the coordinator has to hear again on a new connection."""
        with self._changed:
            said: list[Ready | Leaving | Entered] = [Leaving()] if self._leaves is not None else []
            if self._ready is not None:
                said.append(self._ready)
            elif self._entered == self._generation >= 0:
                said.append(Entered(generation=self._generation))
            return said

    def beat(self) -> Beat:
        """This worker's sign of life."""
        standing = self._standing
        return Beat(
            update=standing.update,
            position=standing.position,
            stage=standing.stage,
            num_micro_batches=standing.num_micro_batches,
            busy_seconds=standing.busy_seconds,
        )

    def hear(self, message: FromCoordinator) -> None:
        """Take in what the coordinator said."""
        with self._changed:
            match message:
                case Form():
                    if message.generation > self._generation:
                        self._form = message
                case Regroup():
                    self._regroup = message.generation
                case Abort():
                    self._over = max(self._over, message.generation)
                    logger.info("generation %d is over: %s", message.generation, message.reason)
                    if self._generation <= message.generation and self._engine is not None:
                        self._engine.abort()
                case Probe():
                    if self._generation == message.generation and self._engine is not None:
                        self._engine.probe()
                case Leave():
                    self._leaves = message.reason
                case Stop():
                    self._stops = message.reason
                case End():
                    self._end = message.reason
                case Refused():
                    self._refused = message.reason
                case Welcome() | StoreReply():
                    pass
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """The connection cannot be made, for a reason that waiting does not mend."""
        with self._changed:
            self._refused = reason
            self._changed.notify_all()

    # Waiting for worlds and forming them, on the training thread.

    def _await_world(self, *, broken: bool) -> Engine:
        while True:
            form = self._await_form(broken)
            try:
                return self._form_world(form)
            except WorldBroken as error:
                logger.warning("%s", error)
                broken = True

    def _await_form(self, broken: bool) -> Form:
        """Say that this worker is ready and wait until it is in a world."""
        self._standing.stage = "wait"
        ready = Ready(
            after=self._generation,
            broken=broken,
            num_micro_batches=self._standing.num_micro_batches,
            job=self._job,
            newest_writer=self._standing.newest_writer,
        )
        with self._changed:
            self._engine, self._ready = None, ready
        reach("join.ready")
        self._connection.send(ready)
        patience, since = _FIRST_PATIENCE_SECONDS, time.monotonic()
        with self._changed:
            while (form := self._form) is None:
                self._raise_if_unwanted()
                if not self._changed.wait(patience):
                    logger.warning("still waiting for a world; the coordinator is %s", self._connection.condition)
                    self._see_whether_in_vain(min(self._connection.away_seconds, time.monotonic() - since))
                    patience = _PATIENCE_SECONDS
            self._form, self._ready = None, None
            self._generation, self._members = form.generation, form.members
            self._engine = Formation()
        return form

    def _see_whether_in_vain(self, away: float) -> None:
        """Wait no more for a coordinator that ended with the job, or that has been away for too long.

        Args:
            away: Seconds in which this worker waited and there was no coordinator.
        """
        if away >= _PATIENCE_SECONDS and self._credentials.completed_end() >= self._job.get("end", math.inf):
            self._end = "the job is complete"
        elif away >= _AWAY_SECONDS:
            raise NoCoordinator(self._connection.condition, away)

    def _raise_if_unwanted(self) -> None:
        if self._refused is not None:
            raise Refusal(self._refused)
        if self._end is not None:
            self._standing.ended = "left"
            raise LeftWorld(self._end, job_is_complete=not self._end.startswith("stopped"))
        if self._leaves is not None:
            self._standing.ended = "left"
            raise LeftWorld(self._leaves, job_is_complete=False)

    def _form_world(self, form: Form) -> Engine:
        self._standing.stage = "form"
        reach("form.start")
        rank = form.members.index(self._connection.name)
        address = self._connection.address
        if is_loopback(address) and not form.all_on_loopback:
            raise InvalidSetting(
                "ELASTIC_BATCH_ADDRESS", address, "must not be a loopback address: other workers are on other hosts"
            )
        formation = self._engine
        assert isinstance(formation, Formation)
        engine: Engine
        if len(form.members) == 1:
            engine = SoloEngine(form.generation)
        else:
            timeout = timedelta(seconds=form.seconds)
            engine = DistributedEngine.form(
                SessionStore(lambda **fields: self._connection.ask(form.generation, **fields), timeout),
                formation,
                rank=rank,
                size=len(form.members),
                generation=form.generation,
                device=self._device,
                address=address,
                forming_timeout=timeout,
            )
        reach("form.done")
        self._formed_at = time.monotonic()
        with self._changed:
            self._engine = engine
            if self._over >= form.generation:
                engine.abort()  # it was over before it had an engine to be told
        logger.info("generation %d: rank %d of %d", form.generation, rank, len(form.members))
        return engine


def join(device: torch.device, environ: Mapping[str, str] = os.environ) -> Session:
    """The session that the environment asks for.

    Raises:
        InvalidSetting: The environment does not say where the coordinator is, or what its token is.
    """
    return Session(Credentials.from_environment(environ), device)
