"""Runs as a report sees them: columns of numbers, and groups of runs that differ in their seed only."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_batch.errors import InvalidSetting, RunDirectoryMissing
from elastic_batch.report.settings import FIRST_VALUES, Settings, settings_of, task_of, tell_apart
from elastic_batch.rundir import has_updates, is_used, read_evaluations, read_job, read_metrics, read_summary

Column = NDArray[np.float64]

_COLUMNS = (
    "update", "position", "epoch", "phase", "global_batch_size", "learning_rate", "momentum", "noise_scale",
    "measured_noise_scale", "loss", "seconds",
)  # fmt: skip
_UNFINISHED = " (unfinished)"


@dataclass(frozen=True)
class Run:
    """One run, read from its directory.

    Attributes:
        name: The job's name.
        strategy: How the schedule trades learning rate for batch.
        seed: The job's seed; None if it is not known.
        updates: A column for each field of an update's record, in order of updates; NaN where it was null.
        evaluations: `update` and `epoch` of the evaluations, and a column for each metric.
        baseline_updates: Updates of plain decay at the same settings; None if it is not known.
        is_finished: Whether the run came to its end.
        settings: What else alters the trajectory.
    """

    name: str
    strategy: str
    seed: int | None
    updates: Mapping[str, Column]
    evaluations: Mapping[str, Column]
    baseline_updates: int | None
    is_finished: bool = True
    settings: Settings = field(default_factory=dict)

    @property
    def num_updates(self) -> int:
        """Updates done."""
        return int(self.updates["update"][-1])

    @property
    def num_samples(self) -> int:
        """Samples committed."""
        return int(self.updates["position"][-1])

    @property
    def seconds(self) -> float:
        """Time of all updates, without evaluations and what the user did between them."""
        return float(np.nansum(self.updates["seconds"]))

    @property
    def metrics(self) -> list[str]:
        """Names of what was evaluated."""
        return [name for name in self.evaluations if name not in ("update", "epoch")]

    def final(self, metric: str) -> float:
        """The last evaluation's value; NaN if there is none."""
        values = self.evaluations.get(metric, np.empty(0))
        known = values[~np.isnan(values)]
        return float(known[-1]) if known.size else float("nan")

    @cached_property
    def starts(self) -> Column:
        """The epoch at which each update begins, whereas column `epoch` is where it ends."""
        return np.concatenate([[0.0], self.updates["epoch"][:-1]])

    @cached_property
    def planned_batches(self) -> Column:
        """The global batch of each update as scheduled: the last update has only the samples that remain."""
        batches, phases = self.updates["global_batch_size"].copy(), self.updates["phase"]
        if len(batches) > 1 and phases[-1] == phases[-2]:
            batches[-1] = batches[-2]
        return batches

    @cached_property
    def boundaries(self) -> Column:
        """The epochs at which a phase begins, without the first."""
        begins = np.diff(self.updates["phase"]) != 0
        return np.compress(begins, self.starts[1:])


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, drawn as one curve: their mean, and the range that they span.

    Attributes:
        label: What distinguishes them from the other groups.
        runs: At least one.
    """

    label: str
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        """The job's name, of all of them."""
        return self.runs[0].name

    @property
    def strategy(self) -> str:
        """The strategy of all of them."""
        return self.runs[0].strategy

    @property
    def settings(self) -> Settings:
        """The settings of all of them."""
        return self.runs[0].settings

    @property
    def is_finished(self) -> bool:
        """Whether all of them came to their ends."""
        return all(run.is_finished for run in self.runs)

    @property
    def seeds(self) -> list[int]:
        """Their seeds, as far as known."""
        return sorted(run.seed for run in self.runs if run.seed is not None)


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Run directories, each once, named itself or by the directory that it lies in.

    Raises:
        RunDirectoryMissing: A path holds no run.
        InvalidSetting: It holds one that has no update on record.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        runs = [path] if has_updates(path) else [candidate for candidate in inside if has_updates(candidate)]
        if not runs:
            if is_used(path):
                raise InvalidSetting("RUN", str(path), "must have an update on record, in metrics.jsonl")
            raise RunDirectoryMissing(str(path))
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def load_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        RunDirectoryMissing: There is no run with at least one update in it.
    """
    job, summary = read_job(path), read_summary(path)
    updates = _columns(read_metrics(path), _COLUMNS)
    if not updates["update"].size:
        raise RunDirectoryMissing(str(path))
    evaluations = list(read_evaluations(path))
    metrics = sorted({name for record in evaluations for name in record["metrics"]})
    flat = ({**record["metrics"], "update": record["update"], "epoch": record["epoch"]} for record in evaluations)
    schedule = job.get("schedule")
    planned = schedule.get("strategy") if isinstance(schedule, dict) else None
    return Run(
        name=str(summary.get("name") or job.get("name") or path.resolve().name),
        strategy=str(planned or summary.get("strategy") or path.resolve().name),
        seed=_first_known(summary.get("seed"), job.get("seed")),
        updates=updates,
        evaluations=_columns(flat, ("update", "epoch", *metrics)),
        baseline_updates=summary.get("baseline_updates"),
        is_finished=bool(summary.get("finished")) and updates["update"][-1] == summary.get("updates"),
        settings=settings_of(job if planned else {**job, **_first_values(updates)}),
    )


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs that differ in their seed only together; plain decay, if there is any, comes first."""
    alike: dict[Hashable, list[Run]] = {}
    for run in runs:
        alike.setdefault((run.name, run.strategy, frozenset(run.settings.items())), []).append(run)
    firsts = [members[0] for members in alike.values()]
    made = [
        Group(_label(members[0], firsts) + _UNFINISHED * any(not run.is_finished for run in members), members)
        for members in alike.values()
    ]
    return sorted(made, key=lambda group: not is_baseline(group))


def baseline_of(group: Group, groups: Iterable[Group]) -> Group | None:
    """The plain decay that a group is compared with: the most like it of those with its name, else with its task.

    The task is data and model; a script's run does not tell them. None if there is no such group.
    """

    def num_differences(other: Group) -> int:
        return len(set(group.settings.items()) ^ set(other.settings.items()))

    decays = [other for other in groups if is_baseline(other)]
    namesakes = [other for other in decays if other.name == group.name]
    task = task_of(group.settings)
    colleagues = [other for other in decays if task and task_of(other.settings) == task]
    return min(namesakes or colleagues, key=num_differences, default=None)


def _first_values(updates: Mapping[str, Column]) -> dict[str, str]:
    """What a script does not write down of its optimizer and schedule, as far as the first update shows it."""
    return {name: f"{updates[name][0]:.12g}" for name in FIRST_VALUES}


def _label(run: Run, others: Sequence[Run]) -> str:
    """What tells a run from others: its strategy, its name if they have several, and settings where that is equal."""
    several_names = len({other.name for other in others}) > 1
    label = _short_label(run, several_names)
    namesakes = [other.settings for other in others if _short_label(other, several_names) == label]
    return ", ".join(filter(None, [label, tell_apart(run.settings, namesakes)]))


def _short_label(run: Run, several_names: bool) -> str:
    if not several_names:
        return run.strategy
    return run.name if run.strategy in run.name else f"{run.name}: {run.strategy}"


def is_baseline(group: Group) -> bool:
    """Whether the group decays the learning rate at a fixed batch."""
    return group.strategy == "decay-lr"


def _columns(records: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Column]:
    rows = [[record.get(name) for name in names] for record in records]
    # None becomes NaN.
    table = np.array(rows, dtype=np.float64).reshape(-1, len(names))
    return dict(zip(names, table.T, strict=True))


def _first_known(*values: Any) -> int | None:
    return next((int(value) for value in values if value is not None), None)
