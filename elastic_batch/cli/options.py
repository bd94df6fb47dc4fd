"""Options that `plan` and `train` share, and the job that they describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from elastic_batch.errors import InvalidSetting
from elastic_batch.job import Job, load_job, parse_assignments
from elastic_batch.workloads.recipe_book import find_job_file

Command = TypeVar("Command", bound=Callable[..., Any])


_FLAGS = {
    "schedule.strategy": "--strategy",
    "schedule.max_duration": "--max-duration",
    "seed": "--seed",
    "metrics_port": "--metrics-port",
    "loggers": "--log",
}
"""Field of a job -> the flag that sets it."""


def job_options(command: Command) -> Command:
    """Add the job's argument and the flags that change it."""
    for decorate in (
        click.option("--seed", type=int, metavar="N", help="Seed of weights, order, augmentation and dropout."),
        click.option("--max-duration", metavar="LENGTH", help="Length of training: 90ep, 5e6sp, 250e9tok."),
        click.option(
            "--strategy", metavar="NAME", help="Another strategy for the same job: decay-lr, grow-batch, hybrid."
        ),
        click.option(
            "--set",
            "assignments",
            metavar="NAME=VALUE",
            multiple=True,
            help="Set any field, as in optimizer.momentum=0.95; repeatable.",
        ),
        click.argument("job_name", metavar="RECIPE|FILE"),
    ):
        command = decorate(command)
    return command


def read_job(
    job_name: str,
    environ: Mapping[str, str],
    *,
    assignments: tuple[str, ...] = (),
    strategy: str | None = None,
    max_duration: str | None = None,
    seed: int | None = None,
    **flags: Any,
) -> Job:
    """Find and load the job that a command line names.

    Args:
        job_name: A recipe's name or a path.
        environ: Where `ELASTIC_BATCH_*` is read.
        assignments: Words of `--set`.
        strategy: `--strategy`.
        max_duration: `--max-duration`.
        seed: `--seed`.
        flags: Further fields that have a flag, by name; None is "not given".

    Raises:
        InvalidSetting: The job does not exist or is wrong.
    """
    given = {"schedule.strategy": strategy, "schedule.max_duration": max_duration, "seed": seed, **flags}
    chosen = {name: value for name, value in given.items() if value is not None}
    path, changes = find_job_file(job_name), {**parse_assignments(assignments), **chosen}
    try:
        return load_job(path, environ=environ, flags=changes)
    except InvalidSetting as error:
        name = error.field.partition("[")[0]
        if name in chosen:
            raise error.renamed(_FLAGS[name]) from None
        raise
