"""`elastic-batch recipes`: the job files that come with the package."""

from __future__ import annotations

import json

import click
from rich.table import Table

from elastic_batch.cli.output import open_console
from elastic_batch.workloads.recipe_book import find_job_file, recipe_names, recipe_summary


@click.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, name to {summary, path}.")
@click.option("--show", metavar="NAME", help="Print a recipe's file, to start a job of your own from.")
def command(as_json: bool, show: str | None) -> None:
    """List the job files that come with the package."""
    if show is not None:
        click.echo(find_job_file(show).read_text(encoding="utf-8"), nl=False)
        return
    if as_json:
        entries = {name: {"summary": recipe_summary(name), "path": str(find_job_file(name))} for name in recipe_names()}
        click.echo(json.dumps(entries, indent=2))
        return
    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for name in recipe_names():
        table.add_row(name, recipe_summary(name))
    console = open_console()
    console.print(table)
    console.print("\nelastic-batch plan RECIPE shows what one would do; recipes --show RECIPE prints its file.")
