"""`elastic-batch worker`: this machine's workers for a job whose coordinator runs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from elastic_batch.cli.elastic import RUN_DIR, TOKEN_FILE, URL, join_job, say_how_it_ended
from elastic_batch.cli.invocation import Invocation
from elastic_batch.cli.places import require_file
from elastic_batch.cli.run import require_script
from elastic_batch.cli.train import plan_arguments
from elastic_batch.errors import InvalidSetting
from elastic_batch.protocol import require_address
from elastic_batch.scaling.machine import visible_gpus
from elastic_batch.scaling.pool import Program


@click.command("worker", context_settings={"allow_interspersed_args": False})
@click.option(
    "--nproc-per-node",
    default="auto",
    metavar="N|auto",
    help="Workers here; default: one per GPU, or one without GPUs.",
)
@click.option("--coordinator", metavar="URL", help=f"Address of the coordinator; default: ${URL}.")
@click.option("--token-file", metavar="FILE", help=f"File with the coordinator's token; default: ${TOKEN_FILE}.")
@click.option("--run-dir", metavar="DIR", help=f"Run directory, if this machine sees it; default: ${RUN_DIR}.")
@click.argument("program", metavar="SCRIPT|RECIPE")
@click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    nproc_per_node: str,
    coordinator: str | None,
    token_file: str | None,
    run_dir: str | None,
    program: str,
    arguments: tuple[str, ...],
) -> int:
    """Join a job with this machine's workers. They run what the job runs: the same SCRIPT or RECIPE, with ARGS.

    The address and the token are the coordinator's, as its host knows them in coordinator.json of the run directory; on
    a machine that sees this directory, --run-dir is enough. Ctrl-C makes these workers leave; the job goes on.

    Exit codes: 0 the job is complete; 75 these workers left or the job was stopped; 2 impossible settings; 1 failed.
    """
    environ = invocation.environ
    url, token, directory = (
        given or environ.get(variable)
        for given, variable in ((coordinator, URL), (token_file, TOKEN_FILE), (run_dir, RUN_DIR))
    )
    if directory is None and (url is None or token is None):
        raise InvalidSetting("--coordinator", url, "must be given with --token-file, or else --run-dir")
    if url is not None:
        require_address("--coordinator", url)
    if directory is not None and not Path(directory).is_dir():
        rule = f"must be the run's directory, and there is none ({Path(directory).absolute()})"
        raise InvalidSetting("--run-dir", directory, rule, "Start the run first, and see that this machine sees it")
    if token is not None:
        require_file("--token-file", token, "must hold the coordinator's token")
    code = join_job(
        _program(program, arguments, directory, environ),
        _num_workers(nproc_per_node, len(visible_gpus(environ))),
        environ,
        url=url,
        token_file=Path(token) if token else None,
        run_dir=Path(directory) if directory else None,
    )
    say_how_it_ended(code, invocation.with_options(), Path(directory) if directory else None)
    return code


def _program(name: str, arguments: tuple[str, ...], run_dir: str | None, environ: Mapping[str, str]) -> Program:
    """A Python file is a script; all else is for `train` to find."""
    if name.endswith(".py"):
        require_script(name)
        return Program(script=name, arguments=arguments)
    plan_arguments([name, *arguments], environ)  # what cannot run fails here, not in each worker
    place = ["--run-dir", run_dir] if run_dir is not None else []
    return Program(script=None, arguments=["train", name, *arguments, *place, "--resume", "auto"])


def _num_workers(text: str, num_gpus: int) -> int:
    if text == "auto":
        return num_gpus or 1
    if not text.isdecimal() or int(text) < 1:
        raise InvalidSetting("--nproc-per-node", text, "must be auto or a number of workers, at least 1")
    return int(text)
