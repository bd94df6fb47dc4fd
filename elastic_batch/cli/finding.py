"""Options of the subcommands that speak to a running coordinator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)


def coordinator_options(command: Command) -> Command:
    """Add the flags that say where the coordinator is."""
    for decorate in (
        click.option("--token-file", type=_FILE, metavar="FILE", help="The token; default: $ELASTIC_BATCH_TOKEN_FILE."),
        click.option(
            "--coordinator", "url", metavar="URL", help="Its address instead; default: $ELASTIC_BATCH_COORDINATOR."
        ),
        click.option("--run-dir", type=_FILE, metavar="DIR", help="The run's; default: $ELASTIC_BATCH_RUN_DIR."),
    ):
        command = decorate(command)
    return command
