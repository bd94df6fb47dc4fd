"""`elastic-batch schema`: the job file's JSON Schema, for editors and validators."""

from __future__ import annotations

import json

import click

from elastic_batch.job import job_schema


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of a job file."""
    click.echo(json.dumps(job_schema(), indent=2))
