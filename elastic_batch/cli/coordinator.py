"""`elastic-batch coordinator`: the service that decides who trains."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import click

from elastic_batch.cli.invocation import Invocation
from elastic_batch.cli.main import EXIT_RESUMABLE
from elastic_batch.coordinator.config import CoordinatorConfig
from elastic_batch.coordinator.state import MembershipConfig

_EXIT_CODES = {"complete": 0, "stopped": EXIT_RESUMABLE, "told to end": 128 + signal.SIGTERM}
_MANY = 1 << 30
_DEFAULTS = MembershipConfig()
_FILE = click.Path(path_type=Path)


@click.command("coordinator")
@click.argument("job_name", metavar="[JOB]", required=False)
@click.option("--run-dir", metavar="DIR", required=True, type=_FILE, help="The run's directory, seen by every worker.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind to; 0.0.0.0 for all.")
@click.option("--port", default=0, help="Port; 0 takes the last one if it is free, else any.")
@click.option("--advertise", metavar="HOST", help="Name or address under which workers reach it.")
@click.option("--allow-host", "allowed_hosts", metavar="NAME", multiple=True, help="Another name of it; repeatable.")
@click.option("--min-workers", default=1, show_default=True, help="A world starts with at least so many.")
@click.option("--max-workers", type=int, help="And never has more; default: no limit.")
@click.option(
    "--start-seconds", default=_DEFAULTS.start, help="Fail if no world has started by then; default: wait for ever."
)
@click.option("--spares", default=0, show_default=True, help="Workers in step without work, to take over at once.")
@click.option("--token-file", type=_FILE, metavar="FILE", help="File with the token; default: one is made.")
@click.option("--tls-cert", type=_FILE, metavar="FILE", help="PEM certificate with its chain.")
@click.option("--tls-key", type=_FILE, metavar="FILE", help="Its PEM key.")
@click.option(
    "--eviction-seconds", default=_DEFAULTS.eviction, show_default=True, help="Silence after which a worker is lost."
)
@click.option("--beat-seconds", default=_DEFAULTS.beat, show_default=True, help="Between a worker's signs of life.")
@click.option("--form-seconds", default=_DEFAULTS.form, show_default=True, help="How long forming a world may take.")
@click.option(
    "--gather-seconds",
    default=_DEFAULTS.gather,
    show_default=True,
    help="How long workers may take to come out of a world that is over.",
)
@click.option(
    "--stall-seconds", default=_DEFAULTS.stall, show_default=True, help="How long a worker may keep all others waiting."
)
@click.option(
    "--reconnect-grace-seconds",
    default=_DEFAULTS.reconnect_grace,
    show_default=True,
    help="How long most of the workers, gone out of sight together, are waited for.",
)
@click.option(
    "--orphan-grace-seconds",
    default=_DEFAULTS.orphan_grace,
    show_default=True,
    help="How long a world out of sight is waited for before another one starts.",
)
@click.option(
    "--cool-down-seconds",
    default=_DEFAULTS.cool_down,
    show_default=True,
    help="How long a slot is held off that lost too many workers.",
)
@click.option(
    "--crashes", default=_DEFAULTS.crashes, show_default=True, help="So many losses within a minute are too many."
)
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    job_name: str | None,
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
    config = CoordinatorConfig(membership=membership, **given)
    if job_name is not None:
        from elastic_batch.cli.options import read_job
        from elastic_batch.workloads.planning import plan_job

        plan_job(read_job(job_name, invocation.environ))
    from elastic_batch.coordinator.server import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s coordinator: %(message)s")
    return _EXIT_CODES[serve(config)]
