"""`elastic-batch plan`: what a job would do and cost, in a second and without its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from elastic_batch.cli.invocation import Invocation
from elastic_batch.cli.options import job_options, read_job
from elastic_batch.errors import InvalidSetting
from elastic_batch.workloads.planning import plan_job


@click.command("plan")
@job_options
@click.option(
    "--workers", metavar="N,N,...", help="Numbers of workers to show; default: a selection of all that make sense."
)
@click.option("--measure", is_flag=True, help="Time steps of the real model here, and show hours.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw it: .png or .svg.")
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    workers: str | None,
    measure: bool,
    as_json: bool,
    plot: Path | None,
    **job_flags: Any,
) -> None:
    """Show what a job would do: phases, updates, micro-batches per worker, hours.

    RECIPE is one of `elastic-batch recipes`, FILE a job file of your own.
    """
    if plot is not None:
        from elastic_batch.cli.plan_picture import check_picture, draw_plan

        check_picture(plot)
    planned = plan_job(read_job(environ=invocation.environ, **job_flags))
    numbers = _usual_workers(planned.max_workers) if workers is None else _read_workers(workers)
    times = None
    if measure:
        from elastic_batch.workloads.speed import measure_steps  # loads torch

        times = measure_steps(planned.job, max_width=planned.max_workers)
    if as_json:
        from elastic_batch.cli.plan_json import plan_as_json

        click.echo(json.dumps(plan_as_json(planned, numbers, times), indent=2, allow_nan=False))
    else:
        from elastic_batch.cli.plan_text import print_plan  # rich takes a tenth of a second to load

        print_plan(planned, numbers, times)
    if plot is not None:
        draw_plan(planned, plot)
        click.echo(f"Drawn: {plot}", err=True)


def _read_workers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if min(numbers, default=0) < 1:
        raise InvalidSetting("--workers", text, "must be numbers from 1 on, with commas in between, as in 1,4,7")
    return numbers


def _usual_workers(most: int) -> list[int]:
    """Every number where these are few; else powers of two, and the largest."""
    if most <= 8:
        return list(range(1, most + 1))
    return sorted({2**power for power in range(most.bit_length())} | {most})
