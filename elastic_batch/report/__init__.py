"""Reports: pictures and a table from run directories."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_batch.errors import PackageMissing, UnknownName
from elastic_batch.report.runs import Group, find_runs, group_runs, load_run
from elastic_batch.report.table import HEADER, Row, as_markdown, cells, make_table
from elastic_batch.strict_json import to_json

__all__ = ["HEADER", "Report", "Row", "cells", "write_report"]


@dataclass(frozen=True)
class Report:
    """What `write_report` made.

    Attributes:
        rows: The table, a row for each group of runs.
        files: Everything written.
    """

    rows: Sequence[Row]
    files: Sequence[Path]


def write_report(
    paths: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str], *, metric: str | None = None
) -> Report:
    """Draw runs on common axes, and tabulate them.

    Runs that differ in their seed only become one curve, the mean, with the range that they span.

    Args:
        paths: Run directories, or directories that hold some.
        output: Where to put the pictures (PNG and SVG) and the table (Markdown and JSON); made if it is not there.
        metric: What to draw of the evaluations; None takes `accuracy`, or else the first that is not a loss.

    Raises:
        RunDirectoryMissing: A path holds no run.
        UnknownName: No run has evaluated this metric.
        PackageMissing: matplotlib is not installed.
    """
    try:
        from elastic_batch.report.figures import draw_figures  # loads matplotlib
    except ImportError as error:
        raise PackageMissing("drawing", "matplotlib", "report") from error
    groups = group_runs([load_run(path) for path in find_runs(paths)])
    metric = _choose_metric(groups, metric)
    rows = make_table(groups, metric)
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    files = draw_figures(groups, metric, directory)
    tables = {"table.md": as_markdown(rows), "table.json": to_json([row.as_json() for row in rows], indent=2) + "\n"}
    for name, text in tables.items():
        (directory / name).write_text(text, encoding="utf-8")
        files.append(directory / name)
    return Report(rows, files)


def _choose_metric(groups: Sequence[Group], wanted: str | None) -> str | None:
    known = list(dict.fromkeys(name for group in groups for run in group.runs for name in run.metrics))
    if wanted is not None and wanted not in known:
        raise UnknownName("metric", wanted, known)
    if wanted is None and "accuracy" in known:
        return "accuracy"
    return wanted or next((name for name in known if "loss" not in name), known[0] if known else None)
