"""What `run`, `train --workers` and `worker` share: one machine's part in an elastic job, from the command line."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from elastic_batch.cli.main import EXIT_RESUMABLE
from elastic_batch.cli.places import PATH, require_directory
from elastic_batch.coordinator.config import CoordinatorConfig
from elastic_batch.coordinator.state import MembershipConfig
from elastic_batch.protocol import is_loopback
from elastic_batch.rundir import Hold
from elastic_batch.scaling.link import CoordinatorLink
from elastic_batch.scaling.machine import (
    WorkerRange,
    num_cores,
    require_gpu_each,
    shared_settings,
    visible_gpus,
    worker_settings,
)
from elastic_batch.scaling.output import Show
from elastic_batch.scaling.pool import PoolSettings, Program
from elastic_batch.scaling.supervisor import SupervisorSettings, supervise

RUN_DIR, TOKEN_FILE, URL = "ELASTIC_BATCH_RUN_DIR", "ELASTIC_BATCH_TOKEN_FILE", "ELASTIC_BATCH_COORDINATOR"
_SLOT, _NAME, _GOES_ON = "ELASTIC_BATCH_SLOT", "ELASTIC_BATCH_WORKER_NAME", "ELASTIC_BATCH_GOES_ON"
LOGS = "logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where the coordinator that is started listens, for machines that join.

    Args:
        host: Address.
        port: 0: any that is free.
        token_file: A file with the token; None: a new one, in the run directory.
        tls_cert: PEM file.
        tls_key: PEM file.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def flags(self) -> list[str]:
        """As the coordinator's command takes them."""
        files = {"--token-file": self.token_file, "--tls-cert": self.tls_cert, "--tls-key": self.tls_key}
        given = [word for flag, file in files.items() if file is not None for word in (flag, str(file))]
        return ["--host", self.host, "--port", str(self.port), *given]


def listening_options(command: Any) -> Any:
    """Add the flags that say where the coordinator listens."""
    for decorate in (
        click.option("--tls-key", type=PATH, metavar="FILE", help="PEM key of --tls-cert."),
        click.option("--tls-cert", type=PATH, metavar="FILE", help="PEM certificate of the coordinator, for https."),
        click.option("--token-file", type=PATH, metavar="FILE", help="Token of the workers; default: a new one."),
        click.option("--port", default=0, metavar="PORT", help="Port of the coordinator; default: any."),
        click.option(
            "--host",
            default="127.0.0.1",
            metavar="HOST",
            show_default=True,
            help="Address of the coordinator; 0.0.0.0 for workers elsewhere.",
        ),
    ):
        command = decorate(command)
    return command


def default_workers(environ: Mapping[str, str]) -> str:
    """The range where none is given: up to one worker a GPU, or a core where there is no GPU."""
    return f"1:{len(visible_gpus(environ)) or num_cores()}"


def run_job(
    program: Program,
    workers: str,
    run_dir: Path,
    environ: Mapping[str, str],
    *,
    listening: Listening,
    spares: int = 0,
    on_cpu: bool = False,
    show: Show = click.echo,
) -> int:
    """Run a job with its coordinator and workers on this machine; other machines may join.

    Args:
        program: What each worker runs.
        workers: Words of `--workers`.
        run_dir: Where coordinator and workers meet, and logs are kept; made if it is not there.
        environ: This process's environment.
        listening: Where the coordinator listens.
        spares: Workers that the world has beyond those with micro-batches.
        on_cpu: Whether GPUs do not matter.
        show: Takes what there is to see, line by line.

    Returns:
        0: complete; 75: stopped, to be resumed; 2: impossible settings; 1: failed.

    Raises:
        InvalidSetting: The range is none, or asks for more than this machine has; the coordinator cannot listen so.
        RunDirectoryBusy: Another process trains there, or coordinates those that do.
    """
    wanted = WorkerRange.parse(workers)
    gpus = [] if on_cpu else visible_gpus(environ)
    here = wanted.maximum
    if is_loopback(listening.host):
        require_gpu_each(wanted.maximum, gpus, "--workers")
    elif gpus:
        here = min(here, len(gpus))
    directory = run_dir.absolute()
    require_directory("--run-dir", run_dir)
    membership = MembershipConfig(min_workers=wanted.minimum, max_workers=wanted.maximum, spares=spares)
    CoordinatorConfig(run_dir=directory, membership=membership, **asdict(listening))  # which refuses what it cannot do
    Hold(directory).close()  # its coordinator will have it; nothing is started where another one does
    settings = SupervisorSettings(
        pool=_pool(program, [f"local-{index}" for index in range(here)], gpus, environ, directory),
        num_workers=wanted.minimum,
        warm=1,
        follows_demand=True,
        coordinator=(
            *("coordinator", "--run-dir", str(directory)),
            *("--min-workers", str(wanted.minimum), "--max-workers", str(wanted.maximum), "--spares", str(spares)),
            *listening.flags,
        ),
        log_dir=directory / LOGS,
    )
    return supervise(settings, CoordinatorLink(run_dir=directory), show)


def join_job(
    program: Program,
    num_workers: int,
    environ: Mapping[str, str],
    *,
    url: str | None,
    token_file: Path | None,
    run_dir: Path | None,
) -> int:
    """Give this machine's workers to a job whose coordinator runs elsewhere.

    Args:
        program: What each worker runs.
        num_workers: How many.
        environ: This process's environment.
        url: The coordinator's address; None: as the run directory says.
        token_file: A file with its token; None: the run directory's.
        run_dir: The run directory, if this machine sees it; logs are kept there.

    Returns:
        0: complete; 75: stopped, or this machine left; 2: impossible settings; 1: failed.

    Raises:
        InvalidSetting: There are more workers than GPUs.
    """
    gpus = visible_gpus(environ)
    require_gpu_each(num_workers, gpus, "--nproc-per-node")
    named = {URL: url, TOKEN_FILE: None if token_file is None else str(token_file.absolute())}
    variables = {name: value for name, value in named.items() if value is not None}
    directory = run_dir.absolute() if run_dir is not None else None
    slots = [f"{socket.gethostname()}-{index}" for index in range(num_workers)]
    settings = SupervisorSettings(
        pool=_pool(program, slots, gpus, {**environ, **variables}, directory), num_workers=num_workers
    )
    link = CoordinatorLink(url=url, token_file=token_file, run_dir=directory)
    return supervise(settings, link, click.echo)


def say_how_it_ended(code: int, again: str, run_dir: Path | None) -> None:
    """The last words, after the workers' own."""
    if code == EXIT_RESUMABLE:
        click.echo(f"Stopped. Resume with:\n  {again}", err=True)
    elif code and run_dir is not None:
        click.echo(f"Failed. All that was printed: {run_dir / LOGS}", err=True)


def _pool(
    program: Program, slots: Sequence[str], gpus: Sequence[str], environ: Mapping[str, str], run_dir: Path | None
) -> PoolSettings:
    shared = {**environ, **shared_settings(environ, len(slots))}
    if run_dir is not None:
        shared[RUN_DIR] = str(run_dir)
    return PoolSettings(
        program=program,
        slots=slots,
        environ=shared,
        slot_environ={slot: worker_settings(index, gpus) for index, slot in enumerate(slots)},
        slot_variable=_SLOT,
        name_variable=_NAME,
        later_variable=_GOES_ON,
        log_dir=run_dir / LOGS if run_dir is not None else None,
    )
