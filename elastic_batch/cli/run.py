"""`elastic-batch run`: a training script on workers that come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from elastic_batch.cli.elastic import Listening, default_workers, listening_options, run_job, say_how_it_ended
from elastic_batch.cli.invocation import Invocation
from elastic_batch.errors import InvalidSetting
from elastic_batch.scaling.pool import Program
from elastic_batch.workloads.recipe_book import recipe_names


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option(
    "--workers",
    metavar="MIN:MAX",
    help="How many workers; default: from 1 up to one per GPU, or per core.",
)
@click.option("--run-dir", metavar="DIR", help="Where workers meet and logs are kept; default: runs/NAME.")
@listening_options
@click.argument("script", metavar="SCRIPT")
@click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    workers: str | None,
    run_dir: str | None,
    script: str,
    arguments: tuple[str, ...],
    **listening: Any,
) -> int:
    """Run SCRIPT with ARGS in every worker; the trainer in it waits until its worker is wanted.

    A warm worker beyond those wanted is kept ready below the maximum, and dead ones are replaced. Ctrl-C stops all
    after the same update, with a checkpoint.

    Exit codes: 0 trained to the end; 75 stopped early on request, resumable; 2 impossible settings; 1 anything else.
    """
    require_script(script)
    directory = Path(run_dir) if run_dir is not None else Path("runs") / Path(script).stem
    code = run_job(
        Program(script=script, arguments=arguments),
        workers or default_workers(invocation.environ),
        directory,
        invocation.environ,
        listening=Listening(**listening),
    )
    say_how_it_ended(code, invocation.with_options(), directory)
    return code


def require_script(script: str) -> None:
    """Refuse what is no Python file.

    Raises:
        InvalidSetting: There is no such file, or it is a recipe's name.
    """
    if script in recipe_names():
        remedy = f"Train it with: elastic-batch train {script} --workers MIN:MAX"
        raise InvalidSetting("SCRIPT", script, "must be a Python file, and this is a recipe", remedy)
    if not Path(script).is_file():
        raise InvalidSetting("SCRIPT", script, f"there is no such file (looked for {Path(script).absolute()})")
