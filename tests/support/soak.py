"""The long trial: every fault at every stage, over and over, resumable, with a table of what was found."""

from __future__ import annotations

import json
import shutil
import statistics
import textwrap
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support.faults import Cell, cells
from support.trials import CONFIG, Trial

from elastic_batch.coordinator.state import MembershipConfig
from elastic_batch.durable import write_file

TIMES, NUM_FAULTS = 3, 300
"""How often each cell is met at least, and how many faults there are in all."""
JOBS = ("digits", "tokens")


class Soak:
    """All trials until each cell was met often enough.

    Args:
        folder: Where what was found is kept; the same folder goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state, self._failures = folder / "trials.jsonl", folder / "failures.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        text = self._state.read_text() if self._state.exists() else ""
        self.trials: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def run(self, deadline: float) -> bool:
        """Run trials until a moment of the monotonic clock. Returns whether all is done."""
        while (waiting := self._waiting()) and time.monotonic() < deadline:
            number = len(self.trials)
            folder = self._folder / f"trial-{number}"
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed or was interrupted
            try:
                with Trial(folder, JOBS[number % len(JOBS)]) as trial:
                    for cell, repetition in waiting:
                        if not trial.has_room or time.monotonic() > deadline:
                            break
                        cell.strike(trial, cell.name, repetition)
                    verdict = asdict(trial.finish())
            except Exception as error:
                # The next attempt must not hide it.
                with self._failures.open("a") as failures:
                    failures.write(json.dumps({"trial": number, "error": str(error)[:2000]}) + "\n")
                raise
            self.trials.append({**verdict, "job": trial.job})
            shutil.rmtree(folder)
            write_file(self._state, "".join(json.dumps(each) + "\n" for each in self.trials).encode())
        return not self._waiting()

    @property
    def num_failed(self) -> int:
        """How many runs failed, and were repeated when the soak went on."""
        return len(self._failures.read_text().splitlines()) if self._failures.exists() else 0

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        """Every fault, with what its trial showed in the end."""
        return [
            {**recovery, "difference": trial["difference"], "repeated": trial["repeated"]}
            for trial in self.trials
            for recovery in trial["recoveries"]
        ]

    def _waiting(self) -> list[tuple[Cell, int]]:
        """What is still to be met, each cell's repetitions in turn: first all cells once, then twice, and so on."""
        met: dict[str, int] = defaultdict(int)
        for recovery in self.recoveries:
            met[recovery["cell"]] += 1
        all_cells = cells()
        num_rounds = max(TIMES, -(-NUM_FAULTS // len(all_cells)))
        wanted = [(cell, round_) for round_ in range(num_rounds) for cell in all_cells]
        wanted = wanted[: max(NUM_FAULTS, TIMES * len(all_cells))]
        return [(cell, round_) for cell, round_ in wanted if met[cell.name] <= round_]


def _settings() -> str:
    """The coordinator's bounds that a trial shortens, as its command line has them."""
    usual = asdict(MembershipConfig())
    shortened = {name: value for name, value in asdict(CONFIG).items() if value < usual[name]}
    return ", ".join(
        f"`--{name.replace('_', '-')}-seconds {value:g}` instead of {usual[name]:g}"
        for name, value in shortened.items()
    )


def _paragraph(text: str) -> str:
    """Text in lines as long as those of the other pages."""
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _repeated_runs(number: int) -> str:
    """How many runs failed, and were repeated when the soak went on."""
    if not number:
        return "No run had to be repeated."
    return f"{number} {'run' if number == 1 else 'runs'} failed and had to be repeated."


def table(soak: Soak) -> str:
    """What was found, as Markdown: a line for each cell."""
    by_cell: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for recovery in soak.recoveries:
        by_cell[recovery["cell"]].append(recovery)
    worst = max((recovery["difference"] for recovery in soak.recoveries), default=0.0)
    repeated = sum(trial["repeated"] for trial in soak.trials)
    lines = [
        "# Faults that an elastic job came through",
        "",
        _paragraph(
            f"{len(soak.recoveries)} faults in {len(soak.trials)} runs of the jobs {' and '.join(JOBS)}, two data"
            " processes for each worker, worlds of one to three workers. Written by `make soak`; each fault, one by"
            " one, is in [elastic-faults.json](elastic-faults.json)."
        ),
        "",
        _paragraph(f"Settings of the trial, shorter than the defaults: {_settings()}."),
        "",
        _paragraph(
            f"{_repeated_runs(soak.num_failed)} The end state differs from that of an undisturbed run of one worker by"
            f" at most {worst:.1e} (allowed: 1e-9). {repeated} updates were committed twice: those since the newest"
            " checkpoint where no worker with a state was left, and those of a worker that was given up or killed right"
            " after it alone had committed."
        ),
        "",
        _paragraph(
            "Seconds are from the fault to the first commit that was not under way then; the bound is the sum of the"
            " bounds in force: noticing, coming out, forming, training."
        ),
        "",
        "| fault | times | median seconds | worst seconds | bound | end state off by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for cell in cells():
        met = by_cell[cell.name]
        if met:
            seconds = [each["seconds"] for each in met]
            bound = min(each["bound"] for each in met)
            times = f"{statistics.median(seconds):.2f} | {max(seconds):.2f} | {bound:.1f}"
            lines.append(f"| {cell.name} | {len(met)} | {times} | {max(each['difference'] for each in met):.1e} |")
    return "\n".join(lines) + "\n"
