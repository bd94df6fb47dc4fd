"""The coordinator's process: takes the run up, serves until it is over or a signal comes, closes what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import signal
import socket
import ssl
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from elastic_batch.coordinator.announcement import Announcement, choose_token, read_announcement, write_announcement
from elastic_batch.coordinator.app import make_app
from elastic_batch.coordinator.config import CoordinatorConfig
from elastic_batch.coordinator.journal import FILE, Journal
from elastic_batch.coordinator.metrics import WorldMetrics
from elastic_batch.coordinator.run import COMPLETE, Run
from elastic_batch.coordinator.service import Service
from elastic_batch.durable import make_directory
from elastic_batch.errors import ElasticBatchError, InvalidSetting
from elastic_batch.protocol import MAX_MESSAGE_BYTES
from elastic_batch.version import VERSION

logger = logging.getLogger(__name__)

_WILDCARDS = ("0.0.0.0", "::", "")
_CLOSE_SECONDS = 1


Outcome = Literal["complete", "stopped", "ended by a signal"]


def serve(config: CoordinatorConfig) -> Outcome:
    """Serve a run until it is over, or until SIGTERM or SIGINT; workers train on without a coordinator.

    Returns:
        `complete`: the job is. `stopped`: all workers stopped, and the run can be resumed.

    Raises:
        InvalidSetting: The port is taken, the token file cannot be used, or the like.
        JournalUnusable: The journal is damaged, newer, or another coordinator's.
        OSError: The run directory cannot be written to.
    """
    make_directory(config.run_dir)
    _allow_many_connections()
    last = read_announcement(config.run_dir)
    token = choose_token(config.token_file, last)
    with contextlib.closing(Journal(config.run_dir / FILE)) as journal:
        run_id = journal.fact("run_id") or (last.run_id if last is not None else None)
        run = _take_up(config, journal, run_id)
        with _bind(config, last.port if last is not None else 0) as listener:
            run.announce = lambda: _announce(config, listener, token, run.run_id)
            run.announce()
            return asyncio.run(_serve(config, Service(run), listener, token))


async def _serve(config: CoordinatorConfig, service: Service, listener: socket.socket, token: str) -> Outcome:
    hosts = (*config.allowed_hosts, *([config.advertise] if config.advertise else []), config.host)
    server = _Server(_uvicorn(config, make_app(service, token=token, hosts=hosts)))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    serving = asyncio.create_task(server.serve([listener]))
    driving = asyncio.create_task(service.serve())
    await asyncio.wait([serving, driving], return_when=asyncio.FIRST_COMPLETED)
    server.stop()
    await serving
    if not driving.done():
        driving.cancel()
    await asyncio.wait([driving])
    service.save()
    if driving.cancelled():
        return "ended by a signal"
    return "complete" if driving.result() == COMPLETE else "stopped"


class _Server(uvicorn.Server):
    """Uvicorn, without hands on the process's signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def stop(self) -> None:
        """Stop serving soon."""
        self.should_exit = True


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


def _take_up(config: CoordinatorConfig, journal: Journal, run_id: str | None) -> Run:
    is_new = run_id is None
    name = run_id or secrets.token_hex(8)
    run = Run(
        run_id=name,
        is_new=is_new,
        directory=config.run_dir,
        membership=config.membership,
        journal=journal,
        metrics=WorldMetrics(CollectorRegistry(), run=config.run_dir.resolve().name),
    )
    run.recover()
    journal.keep("run_id", name)
    world = run.state.world
    if world is not None:
        logger.info("the journal knows generation %d of %d workers", world.generation, len(world.members))
    return run


def _bind(config: CoordinatorConfig, last_port: int) -> socket.socket:
    """A listening socket; where any port will do, the last one if it is free.

    Raises:
        InvalidSetting: The port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    ports = [config.port] if config.port else [last_port, 0] if last_port else [0]
    for port in ports:
        try:
            return socket.create_server((config.host, port), family=family, backlog=4096)
        except OSError as error:
            failure = error
    raise InvalidSetting(
        "port", config.port, f"must be free on {config.host} ({failure})", "Choose another, or 0 for any free one"
    )


def _announce(config: CoordinatorConfig, listener: socket.socket, token: str, run_id: str) -> None:
    scheme = "https" if config.tls_cert else "http"
    host = config.advertise or (_own_address() if config.host in _WILDCARDS else config.host)
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    certificate = str(Path(config.tls_cert).resolve()) if config.tls_cert else None
    said = Announcement(url=url, token=token, run_id=run_id, pid=os.getpid(), version=VERSION, tls_cert=certificate)
    write_announcement(config.run_dir, said)
    logger.info("run %s is served at %s", run_id, url)
    if scheme == "http" and not host.startswith("127.") and host not in ("localhost", "::1"):
        logger.warning("without TLS the token crosses the network in the clear; give --tls-cert and --tls-key")


def _own_address() -> str:
    """The address of the interface that leads out; loopback where none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a range for documentation; nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _allow_many_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:
        raise ElasticBatchError(f"cannot raise the limit of open files to {hard}: {error}") from error
