"""Options of the subcommands that speak to a running coordinator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from elastic_batch.cli.places import PATH

Command = TypeVar("Command", bound=Callable[..., Any])


def coordinator_options(command: Command) -> Command:
    """Add the flags that say where the coordinator is."""
    for decorate in (
        click.option(
            "--token-file",
            type=PATH,
            metavar="FILE",
            help="File with the coordinator's token; default: $ELASTIC_BATCH_TOKEN_FILE.",
        ),
        click.option(
            "--coordinator",
            "url",
            metavar="URL",
            help="Address of the coordinator, in place of --run-dir; default: $ELASTIC_BATCH_COORDINATOR.",
        ),
        click.option("--run-dir", type=PATH, metavar="DIR", help="Run directory; default: $ELASTIC_BATCH_RUN_DIR."),
    ):
        command = decorate(command)
    return command
