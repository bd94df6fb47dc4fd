"""`elastic-batch coordinator`: the service that decides who trains."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from elastic_batch.cli.finding import Command
from elastic_batch.cli.invocation import Invocation
from elastic_batch.cli.main import EXIT_RESUMABLE
from elastic_batch.cli.places import PATH, require_directory
from elastic_batch.coordinator.config import CoordinatorConfig
from elastic_batch.coordinator.state import MembershipConfig

_EXIT_CODES = {"complete": 0, "stopped": EXIT_RESUMABLE, "told to end": 128 + signal.SIGTERM}
_MANY = 1 << 30
_DEFAULTS = MembershipConfig()


def _count(flag: str, default: int, text: str) -> Callable[[Command], Command]:
    return click.option(flag, default=default, metavar="N", show_default=True, help=text)


def _time(flag: str, default: float, text: str) -> Callable[[Command], Command]:
    return click.option(flag, default=default, metavar="SECONDS", show_default=True, help=text)


@click.command("coordinator")
@click.argument("job_name", metavar="[JOB]", required=False)
@click.option("--run-dir", metavar="DIR", required=True, type=PATH, help="Run directory, seen by every worker.")
@click.option(
    "--host", metavar="HOST", default="127.0.0.1", show_default=True, help="Address to bind to; 0.0.0.0: all."
)
@click.option(
    "--port", metavar="PORT", default=0, help="Port to bind to; default: the last one if it is free, else any."
)
@click.option("--advertise", metavar="HOST", help="Name or address under which workers reach the coordinator.")
@click.option("--allow-host", "allowed_hosts", metavar="HOST", multiple=True, help="Another such name; repeatable.")
@_count("--min-workers", 1, "A world starts with at least so many workers.")
@click.option("--max-workers", type=int, metavar="N", help="A world never has more workers; default: no limit.")
@_count("--spares", 0, "Workers in step without work, to take over at once.")
@_count("--crashes", _DEFAULTS.crashes, "Losses of one slot within a minute after which it is held off.")
@click.option("--token-file", type=PATH, metavar="FILE", help="File with the token; default: a new one is made.")
@click.option("--tls-cert", type=PATH, metavar="FILE", help="PEM certificate with its chain, for https.")
@click.option("--tls-key", type=PATH, metavar="FILE", help="PEM key of --tls-cert.")
@click.option(
    "--start-seconds",
    metavar="SECONDS",
    default=_DEFAULTS.start,
    help="Fail if no world has started by then; default: wait for ever.",
)
@_time("--eviction-seconds", _DEFAULTS.eviction, "Silence after which a worker is lost.")
@_time("--beat-seconds", _DEFAULTS.beat, "Time between a worker's signs of life.")
@_time("--form-seconds", _DEFAULTS.form, "How long forming a world may take.")
@_time("--gather-seconds", _DEFAULTS.gather, "How long workers may take to come out of a world that is over.")
@_time("--stall-seconds", _DEFAULTS.stall, "How long a worker may keep all others waiting.")
@_time(
    "--reconnect-grace-seconds",
    _DEFAULTS.reconnect_grace,
    "How long most of the workers, gone out of sight together, are waited for.",
)
@_time(
    "--orphan-grace-seconds",
    _DEFAULTS.orphan_grace,
    "How long a world out of sight is waited for before another one starts.",
)
@_time("--cool-down-seconds", _DEFAULTS.cool_down, "How long a slot is held off that lost too many workers.")
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    job_name: str | None,
    run_dir: Path,
    min_workers: int,
    max_workers: int | None,
    spares: int,
    crashes: int,
    **given: Any,
) -> int:
    """Serve an elastic run. JOB, a recipe or file, is checked before anything starts; workers bring theirs.

    Exit codes: 0 the job is complete; 75 the run was stopped and can be resumed; 143 this service alone was told to end
    (SIGTERM), its workers train on; 2 impossible settings; 1 anything else.
    """
    times = {name.removesuffix("_seconds"): given.pop(name) for name in list(given) if name.endswith("_seconds")}
    membership = MembershipConfig(
        min_workers=min_workers,
        max_workers=_MANY if max_workers is None else max_workers,
        spares=spares,
        crashes=crashes,
        **times,
    )
    require_directory("--run-dir", run_dir)
    config = CoordinatorConfig(run_dir=run_dir, membership=membership, **given)
    if job_name is not None:
        from elastic_batch.cli.options import read_job
        from elastic_batch.workloads.planning import plan_job

        plan_job(read_job(job_name, invocation.environ))
    from elastic_batch.coordinator.server import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s coordinator: %(message)s")
    return _EXIT_CODES[serve(config)]
