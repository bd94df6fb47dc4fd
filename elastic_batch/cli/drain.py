"""`elastic-batch drain`: ask a worker to leave."""

from __future__ import annotations

from pathlib import Path

import click

from elastic_batch.cli.finding import coordinator_options
from elastic_batch.cli.invocation import Invocation
from elastic_batch.coordinator_client import CoordinatorClient


@click.command("drain")
@coordinator_options
@click.argument("worker")
@click.pass_obj
def command(
    invocation: Invocation, /, worker: str, run_dir: Path | None, url: str | None, token_file: Path | None
) -> None:
    """Ask WORKER to leave after the update under way; no work is lost, the others go on."""
    with CoordinatorClient.find(invocation.environ, run_dir=run_dir, url=url, token_file=token_file) as coordinator:
        coordinator.drain(worker)
    click.echo(f"Worker {worker} leaves after the update under way.")
