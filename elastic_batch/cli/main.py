"""The root of the command line: finds the subcommand, turns errors into one message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module

import click

from elastic_batch.cli.invocation import Invocation
from elastic_batch.errors import (
    CheckpointMissing,
    DataMissing,
    ElasticBatchError,
    InvalidSetting,
    JobDiffers,
    LeftWorld,
    PackageMissing,
    Refusal,
    RunDirectoryBusy,
    RunDirectoryMissing,
    RunDirectoryUsed,
)
from elastic_batch.version import VERSION

EXIT_FAILED = 1
"""Something went wrong while working."""
EXIT_USAGE = 2
"""The command line, the job file or the environment asks for something impossible; nothing was started."""
EXIT_RESUMABLE = 75
"""Training was asked to stop, did so after a whole update, and can be resumed (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 130
"""A second Ctrl-C, or one where nothing could be saved."""

_IMPOSSIBLE = (
    InvalidSetting,
    DataMissing,
    PackageMissing,
    RunDirectoryBusy,
    RunDirectoryUsed,
    RunDirectoryMissing,
    CheckpointMissing,
    JobDiffers,
    Refusal,
)
"""Errors that the same command line would meet again."""

COMMANDS = {
    "recipes": "List the job files that come with the package.",
    "plan": "Show what a job would do: phases, updates, micro-batches per worker, hours.",
    "train": "Train a job, alone, under torchrun, or on workers that come and go.",
    "run": "Run a training script on workers that come and go.",
    "worker": "Join a running job with this machine's workers.",
    "coordinator": "Serve an elastic run: decide who trains, keep the journal.",
    "status": "Show an elastic run: its world, its workers, how far it is.",
    "drain": "Ask a worker of an elastic run to leave.",
    "report": "Draw runs: learning rate, batch, loss, accuracy, noise scale.",
    "checkpoint": "List, verify or export checkpoints.",
    "schema": "Print the JSON Schema of a job file.",
}
"""Subcommand -> one line of help; the module `elastic_batch.cli.NAME` has it as `command`."""


class LazyGroup(click.Group):
    """A group that imports a subcommand's module when it is called, so that none pays for another's imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"elastic_batch.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            nearest = get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Known: {', '.join(COMMANDS)}."
            raise click.UsageError(f"There is no command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="elastic-batch")
def root() -> None:
    """Train with a growing batch instead of a decaying learning rate."""


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: The arguments after the program's name; None: those of the process.
        environ: Where `ELASTIC_BATCH_*` and a launcher's variables are read; None: the process's environment.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    invocation = Invocation(arguments, os.environ if environ is None else environ)
    try:
        result = root.main(arguments, prog_name="elastic-batch", standalone_mode=False, obj=invocation)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return EXIT_INTERRUPTED
    except LeftWorld:
        raise
    except SystemExit as error:
        click.echo(f"Error: code that the job names has ended the program: sys.exit({error.code!r})", err=True)
        return EXIT_FAILED
    except BrokenPipeError:
        # Whoever read the output has seen enough (`| head`); without this Python complains when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ElasticBatchError, OSError) as error:
        # Under a launcher every worker has a message of its own; most are the same, but one host may lack the data.
        rank = _rank(invocation)
        worker = f"worker {rank}: " if rank else ""
        click.echo(f"{worker}Error: {error}", err=True)
        return EXIT_USAGE if isinstance(error, _IMPOSSIBLE) else EXIT_FAILED
    else:
        return result if isinstance(result, int) else 0
    return 0


def _rank(invocation: Invocation) -> int:
    try:
        return invocation.rank
    except InvalidSetting:  # which may be what is wrong
        return 0


def console() -> None:
    """Entry point of the installed command."""
    sys.exit(main())
