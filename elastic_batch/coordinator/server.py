"""The coordinator's process: takes the run up, serves until it is over or a signal comes, closes what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import ssl
from collections.abc import Generator
from typing import Literal, Self

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from elastic_batch.coordinator.announcement import Announcement, choose_token, read_announcement, write_announcement
from elastic_batch.coordinator.app import make_app
from elastic_batch.coordinator.config import CoordinatorConfig
from elastic_batch.coordinator.journal import FILE, Journal
from elastic_batch.coordinator.listening import allow_many_connections, bind, public_url
from elastic_batch.coordinator.metrics import WorldMetrics
from elastic_batch.coordinator.run import COMPLETE, Run
from elastic_batch.coordinator.service import Service
from elastic_batch.errors import InvalidSetting
from elastic_batch.protocol import MAX_MESSAGE_BYTES, is_loopback
from elastic_batch.rundir import Hold, open_run_ledger
from elastic_batch.version import VERSION

logger = logging.getLogger(__name__)

Outcome = Literal["complete", "stopped", "told to end"]
"""`complete`: the job is. `stopped`: all workers stopped, and the run can be resumed. `told to end`: this process alone
was; workers train on."""
_CLOSE_SECONDS = 1


class Coordinator:
    """One run's coordinator: it holds the journal and a port from the start, and serves once.

    Args:
        config: Where, and for whom.

    Raises:
        InvalidSetting: The port is taken, the token file cannot be used, or the like.
        RunDirectoryBusy: Another process coordinates or trains in the run directory.
        JournalUnusable: The journal is damaged, newer, or another coordinator's.
        OSError: The run directory cannot be written to.
    """

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        with contextlib.ExitStack() as held:
            held.enter_context(Hold(config.run_dir))
            last = read_announcement(config.run_dir)
            self._token = choose_token(config.token_file, last)
            journal = held.enter_context(contextlib.closing(Journal(config.run_dir / FILE)))
            self._listener = held.enter_context(bind(config, last.port if last is not None else 0))
            self.run = _take_up(config, journal, last)
            self.run.announce = self._announce
            hosts = (*config.allowed_hosts, *([config.advertise] if config.advertise else []), config.host)
            self._service = Service(self.run)
            self._server = _Server(_uvicorn(config, make_app(self._service, token=self._token, hosts=hosts)))
            self._announce()
            self._held = held.pop_all()

    async def serve(self) -> Outcome:
        """Serve until the run is over or `stop` is called."""
        serving = asyncio.create_task(self._server.serve([self._listener]))
        driving = asyncio.create_task(self._service.serve())
        await asyncio.wait([serving, driving], return_when=asyncio.FIRST_COMPLETED)
        if driving.done() and driving.exception() is None:
            self._announce_end(driving.result())
        self.stop()
        await serving
        driving.cancel()
        await asyncio.wait([driving])
        self._service.save()
        if driving.cancelled():
            return "told to end"
        return "complete" if driving.result() == COMPLETE else "stopped"

    def stop(self) -> None:
        """End this process's part soon; workers train on and look for the next one."""
        self._server.should_exit = True

    def close(self) -> None:
        """Give journal and port back."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _announce(self) -> None:
        said = self._write_announcement()
        logger.info("run %s is served at %s", said.run_id, said.url)
        if not said.tls_cert and not is_loopback(self._config.host):
            logger.warning("without TLS the token crosses the network in the clear; give --tls-cert and --tls-key")

    def _announce_end(self, ended: str) -> None:
        try:
            self._write_announcement(ended)
        except OSError as error:
            logger.error("whoever comes from now on waits in vain, for nobody can be told: %s", error)

    def _write_announcement(self, ended: str | None = None) -> Announcement:
        config = self._config
        said = Announcement(
            url=public_url(config, self._listener),
            token=self._token,
            run_id=self.run.run_id,
            pid=os.getpid(),
            version=VERSION,
            tls_cert=str(config.tls_cert.resolve()) if config.tls_cert else None,
            ended=ended,
            completed_end=(self.run.job or {}).get("end") if ended == COMPLETE else None,
        )
        write_announcement(config.run_dir, said)
        return said


def serve(config: CoordinatorConfig) -> Outcome:
    """Serve a run in this process until it is over, or until SIGTERM or SIGINT; raises what `Coordinator` does."""
    allow_many_connections()

    async def serve_until_signal(coordinator: Coordinator) -> Outcome:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, coordinator.stop)
        return await coordinator.serve()

    with Coordinator(config) as coordinator, _collecting_garbage_seldom():
        return uvloop.run(serve_until_signal(coordinator))


@contextlib.contextmanager
def _collecting_garbage_seldom() -> Generator[None, None, None]:
    """Look through old objects hundreds of times less often.

    Those of thousands of connections take half a second to look through, in which no worker hears of a decision; and
    hardly anything here is garbage that reference counts do not find.
    """
    before = gc.get_threshold()
    gc.set_threshold(10_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Server(uvicorn.Server):
    """Uvicorn, without hands on the process's signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _uvicorn(config: CoordinatorConfig, app: Starlette) -> uvicorn.Config:
    try:
        made = uvicorn.Config(
            app,
            loop="asyncio",
            ws="websockets-sansio",
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_ping_interval=None,  # workers beat
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            ssl_certfile=config.tls_cert,
            ssl_keyfile=config.tls_key,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        made.load()
    except ssl.SSLError as error:
        raise InvalidSetting(
            "tls_cert", str(config.tls_cert), f"must be a PEM certificate that belongs to tls_key ({error})"
        ) from error
    return made


def _take_up(config: CoordinatorConfig, journal: Journal, last: Announcement | None) -> Run:
    """The run as journal and last announcement know it; if neither does, a new one."""
    known = journal.fact("run_id") or (last.run_id if last is not None else None)
    run = Run(
        run_id=known or secrets.token_hex(8),
        is_new=known is None,
        directory=config.run_dir,
        membership=config.membership,
        journal=journal,
        metrics=WorldMetrics(
            CollectorRegistry(), run=config.run_dir.resolve().name, ledger=open_run_ledger(config.run_dir)
        ),
    )
    run.recover()
    journal.keep("run_id", run.run_id)
    world = run.state.world
    if world is not None:
        logger.info("the journal knows generation %d of %d workers", world.generation, len(world.members))
    return run
