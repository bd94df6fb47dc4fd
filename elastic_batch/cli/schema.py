"""`elastic-batch schema`: the job file's JSON Schema, for editors and validators."""

from __future__ import annotations

import json

import click

from elastic_batch.job import Job


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of a job file."""
    click.echo(json.dumps(Job.model_json_schema(), indent=2))
