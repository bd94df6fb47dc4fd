"""`elastic-batch report`: pictures and a table of runs."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from elastic_batch.cli.output import open_console
from elastic_batch.cli.places import require_directory


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output", metavar="DIR", help="Where to put pictures and table; default: RUN/report, or report for several."
)
@click.option("--metric", metavar="NAME", help="What to draw of the evaluations; default: accuracy.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(runs: tuple[str, ...], output: str | None, metric: str | None, as_json: bool) -> None:
    """Draw runs on common axes: learning rate, batch, noise scale, loss, accuracy.

    RUN is a run directory, or one that holds some. Runs that differ in their seed only become one curve with a range.
    """
    from elastic_batch.report import write_report

    directory = output or (str(Path(runs[0]) / "report") if len(runs) == 1 else "report")
    if output is not None:
        require_directory("--output", output)
    report = write_report(runs, directory, metric=metric)
    if as_json:
        click.echo((Path(directory) / "table.json").read_text(encoding="utf-8"), nl=False)
        return
    from elastic_batch.report import HEADER, cells

    table = Table(*HEADER, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in report.rows:
        table.add_row(*cells(row))
    console = open_console()
    console.print(table)
    if report.rows[0].metric is not None:
        compared = "; difference: against decay-lr" if any(row.difference is not None for row in report.rows) else ""
        console.print(f"\nfinal: test {report.rows[0].metric}{compared}.")
    console.print(f"Pictures: {directory}/overview.png and {len(report.files) - 1} more files")
