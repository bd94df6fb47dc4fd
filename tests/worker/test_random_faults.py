"""Thirty faults drawn at random: a job comes through all of them with the same end state.

The seed is printed, and `ELASTIC_BATCH_TEST_SEED` gives another one.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from support.faults import Cell, cells
from support.trials import Trial

SEED_VARIABLE = "ELASTIC_BATCH_TEST_SEED"
NUM_FAULTS = 30
JOBS = ("digits", "tokens")


def draw(seed: int) -> list[tuple[Cell, int]]:
    """Cells, each with a repetition, which says who is the victim."""
    chance = random.Random(seed)
    return [(cell, chance.randrange(6)) for cell in chance.sample(cells(), NUM_FAULTS)]


@pytest.mark.timeout(600)
def test_thirty_random_faults_change_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get(SEED_VARIABLE, "3"))
    print(f"{SEED_VARIABLE}={seed}")  # noqa: T201
    waiting = draw(seed)
    num_recovered = num_trials = 0
    while waiting:
        with Trial(tmp_path / f"run-{num_trials}", JOBS[num_trials % len(JOBS)]) as trial:
            while waiting and trial.has_room:
                cell, repetition = waiting.pop()
                cell.strike(trial, cell.name, repetition)
            num_recovered += len(trial.finish().recoveries)
        num_trials += 1
    assert num_recovered == NUM_FAULTS
