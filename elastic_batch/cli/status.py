"""`elastic-batch status`: an elastic run's world, workers and position."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elastic_batch.cli.finding import coordinator_options
from elastic_batch.cli.invocation import Invocation
from elastic_batch.cli.output import open_console
from elastic_batch.coordinator_client import CoordinatorClient, CoordinatorSilent, RunOver

_STYLES = {"active": "green", "spare": "cyan", "lost": "red", "draining": "yellow", "cooling down": "yellow"}
_MOST_ROWS = 100


@click.command("status")
@coordinator_options
@click.option("--watch", is_flag=True, help="Refresh once a second until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the coordinator's answer as JSON.")
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    run_dir: Path | None,
    url: str | None,
    token_file: Path | None,
    watch: bool,
    as_json: bool,
) -> None:
    """Show an elastic run: its world, its workers, how far it is, and why things stand as they do."""

    def ask() -> dict[str, Any]:
        with CoordinatorClient.find(invocation.environ, run_dir=run_dir, url=url, token_file=token_file) as coordinator:
            return coordinator.status()

    try:
        _show(ask, watch=watch, as_json=as_json)
    except RunOver as over:
        said = {"run_id": over.run_id, "phase": "ended", "ended": over.ended, "position": over.num_samples}
        click.echo(json.dumps(said) if as_json else str(over))


def _show(ask: Callable[[], dict[str, Any]], *, watch: bool, as_json: bool) -> None:
    found = ask()
    if as_json:
        click.echo(json.dumps(found, indent=None if watch else 2))
    elif not watch:
        open_console().print(render(found))
    if watch:
        _watch(found, ask, as_json)


def _watch(found: dict[str, Any], ask: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Ask once a second until the run is over; a coordinator that is away may come back, elsewhere perhaps."""
    away: str | None = None
    with nullcontext() if as_json else Live(console=open_console(), auto_refresh=False) as live:
        while True:
            if live is not None:
                live.update(Group(render(found), Text(away or "", style="red")), refresh=True)
            if found["ended"] is not None:
                return
            time.sleep(1)
            try:
                found, away = ask(), None
            except RunOver:
                raise
            except CoordinatorSilent as error:
                away = str(error)
            if as_json and away is None:
                click.echo(json.dumps(found))


def render(status: Mapping[str, Any]) -> RenderableType:
    """The status as a person reads it.

    Args:
        status: What `GET /status` gives.
    """
    workers = status["workers"]
    in_world = sum(worker["state"] in ("active", "spare", "draining") for worker in workers)
    head = Text(f"run {status['run_id']}: {status['ended'] or status['phase']}", style="bold")
    lines = [
        f"world: generation {status['generation']}, {in_world} workers, {status['desired_workers']} wanted; "
        f"{status['reason']}",
        _progress(status),
    ]
    table = Table("worker", "slot", "host", "state", "update", "stage", "heard", box=None, pad_edge=False)
    for worker in workers[:_MOST_ROWS]:
        heard = worker["heard_seconds_ago"]
        table.add_row(
            worker["name"],
            worker["slot"],
            worker["host"],
            Text(worker["state"], style=_STYLES.get(worker["state"], "")),
            str(worker["update"]),
            worker["stage"],
            "-" if heard is None else f"{heard:.1f} s ago",
        )
    more = [Text(f"... and {len(workers) - _MOST_ROWS} more")] if len(workers) > _MOST_ROWS else []
    return Group(head, *map(Text, lines), table, *more)


def _progress(status: Mapping[str, Any]) -> str:
    if status["update"] is None:
        return "no update yet"
    return (
        f"update {status['update']}, {status['position']} samples, epoch {status['epoch']:.2f}; "
        f"global batch {status['global_batch_size']} in {status['num_micro_batches']} micro-batches"
    )
