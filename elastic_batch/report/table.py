"""The table of a report: what each group of runs cost and reached, against the plain decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from elastic_batch.report.runs import Group, baseline_of


@dataclass(frozen=True)
class Row:
    """One group of runs.

    Attributes:
        label: The group's label.
        seeds: Its seeds, as far as known.
        runs: How many runs it has.
        updates: Updates done, the mean over its runs.
        baseline_updates: Updates of plain decay: of the group that it is compared with, or as planned; None if unknown.
        samples: Samples committed, the mean.
        metric: The name of what was evaluated; None if nothing was.
        final_mean: The last evaluation's value, the mean; NaN if there is none.
        final_low: The least of them.
        final_high: The greatest.
        difference: `final_mean` less that of the plain decay that it is compared with; None if there is no other one.
        seconds: Time of all updates, the mean.
    """

    label: str
    seeds: list[int]
    runs: int
    updates: float
    baseline_updates: float | None
    samples: float
    metric: str | None
    final_mean: float
    final_low: float
    final_high: float
    difference: float | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The fields, for a file."""
        return asdict(self)


_UNKNOWN = "-"
HEADER = ("run", "seeds", "updates", "of plain decay", "samples", "final", "range", "difference", "seconds")


def make_table(groups: Sequence[Group], metric: str | None) -> list[Row]:
    """A row for each group, in order."""
    return [_row(group, baseline_of(group, groups), metric) for group in groups]


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of `HEADER`."""
    unit, scale, digits = ("%", 100, 2) if row.metric == "accuracy" else ("", 1, 4)
    known = not np.isnan(row.final_mean)
    ratio = f"{row.updates / row.baseline_updates:.1%}" if row.baseline_updates else _UNKNOWN
    return (
        row.label,
        ", ".join(map(str, row.seeds)) or _UNKNOWN,
        _count(row.updates),
        ratio,
        _count(row.samples),
        f"{scale * row.final_mean:.{digits}f}{unit}" if known else _UNKNOWN,
        f"{scale * row.final_low:.{digits}f} to {scale * row.final_high:.{digits}f}"
        if known and row.runs > 1
        else _UNKNOWN,
        f"{scale * row.difference:+.{digits}f}" if row.difference is not None and known else _UNKNOWN,
        f"{row.seconds:,.1f}".replace(",", " "),
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, numbers to the right."""
    metric = rows[0].metric
    header = [f"{name} {metric}" if name == "final" and metric else name for name in HEADER]
    lines = [header, ["---", "---", *["---:"] * (len(HEADER) - 2)], *map(list, map(cells, rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(group: Group, baseline: Group | None, metric: str | None) -> Row:
    finals = _finals(group, metric)
    difference = None
    if baseline is not None and baseline is not group:
        difference = float(finals.mean() - _finals(baseline, metric).mean())
    return Row(
        label=group.label,
        seeds=group.seeds,
        runs=len(group.runs),
        updates=float(np.mean([run.num_updates for run in group.runs])),
        baseline_updates=_baseline_updates(group, baseline),
        samples=float(np.mean([run.num_samples for run in group.runs])),
        metric=metric,
        final_mean=float(finals.mean()),
        final_low=float(finals.min()),
        final_high=float(finals.max()),
        difference=difference,
        seconds=float(np.mean([run.seconds for run in group.runs])),
    )


def _finals(group: Group, metric: str | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([run.final(metric) if metric else np.nan for run in group.runs])


def _baseline_updates(group: Group, baseline: Group | None) -> float | None:
    if not group.is_finished or (baseline is not None and not baseline.is_finished):
        return None  # a part of a run saves nothing
    if baseline is not None:
        return float(np.mean([run.num_updates for run in baseline.runs]))
    return group.runs[0].baseline_updates


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")
