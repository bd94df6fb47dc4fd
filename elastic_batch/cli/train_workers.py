"""`elastic-batch train --workers`: a job file on workers that come and go."""

from __future__ import annotations

import json
from pathlib import Path

import click

from elastic_batch.cli.elastic import Listening, run_job, say_how_it_ended
from elastic_batch.cli.invocation import Invocation
from elastic_batch.job import Job
from elastic_batch.scaling.pool import Program

_OURS = ("workers", "host", "port", "token_file", "tls_cert", "tls_key")
"""Options that workers do not get."""


def train_on_workers(
    invocation: Invocation, job: Job, directory: str, resume: str, workers: str, listening: Listening, as_json: bool
) -> int:
    """Train a job on worker processes, each of which runs `train` without `--workers`.

    Args:
        invocation: How this command was called.
        job: The job as resolved.
        directory: The run directory.
        resume: `never`, `auto`, or a checkpoint's or run's path.
        workers: Words of `--workers`.
        listening: Where the coordinator listens.
        as_json: Whether standard output gets the lead worker's summary alone.

    Raises:
        InvalidSetting: The range is wrong.
    """
    # All workers may be lost; those that come then go on from the run's own checkpoints.
    first = "auto" if resume == "never" and job.checkpoint.location is None else resume
    summary = _Summary(as_json)
    code = run_job(
        Program(script=None, arguments=invocation.words_with(_OURS, run_dir=directory, resume=first)),
        workers,
        Path(directory),
        invocation.environ,
        listening=listening,
        spares=job.spares,
        on_cpu=job.device == "cpu",
        show=summary.show,
    )
    if summary.found is not None:
        click.echo(json.dumps(summary.found))
    say_how_it_ended(code, invocation.with_options(run_dir=directory, resume="auto"), Path(directory))
    return code


class _Summary:
    """Shows workers' lines; if asked to, on standard error, and keeps the lead worker's summary.

    Args:
        wanted: Whether that is asked.

    Attributes:
        found: The summary.
    """

    def __init__(self, wanted: bool) -> None:
        self.found: dict[str, object] | None = None
        self._wanted = wanted

    def show(self, line: str) -> None:
        """Show a line with its prefix."""
        text = line.partition("] ")[2]
        if self._wanted and text.startswith('{"name": '):
            self.found = json.loads(text)
        else:
            click.echo(line, err=self._wanted)
