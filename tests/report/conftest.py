"""Run directories as training would leave them, with a loss that falls when the noise does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_batch.rundir import Commit, RunDirectory

NUM_SAMPLES = 12_800
PHASES: dict[str, list[tuple[int, float]]] = {
    # (global batch, learning rate) of each phase
    "decay-lr": [(128, 0.1), (128, 0.02), (128, 0.004)],
    "hybrid": [(128, 0.1), (640, 0.1), (640, 0.02)],
    "grow-batch": [(128, 0.1), (640, 0.1), (1280, 0.04)],
}
MILESTONES = (0, 12, 24, 30)

MakeRun = Callable[..., Path]


def write_run(
    path: Path,
    strategy: str,
    seed: int,
    *,
    name: str = "synthetic",
    finished: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run of 30 epochs with milestones at 12 and 24; `settings` are further fields of its job."""
    random = np.random.default_rng([seed, len(strategy)])
    job = {"name": name, "seed": seed, "schedule": {"strategy": strategy}, **(settings or {})}
    position = update = 0
    level, accuracy = 2.3, 0.1
    with RunDirectory.create(path, job) as run:
        for phase, (batch, rate) in enumerate(PHASES[strategy]):
            noise = rate / 0.1 * NUM_SAMPLES / batch
            floor = 0.02 + 0.25 * noise / 100
            while position < MILESTONES[phase + 1] * NUM_SAMPLES:
                epoch_before = position // NUM_SAMPLES
                update, position = update + 1, position + batch
                level = floor + (level - floor) * math.exp(-batch / (3.0 * NUM_SAMPLES) * (4 if phase else 1))
                loss = level * float(random.lognormal(0, 1.2 / math.sqrt(batch / 8)))
                run.record(_update(update, position, phase, batch, rate, noise, loss, random))
                run.commit(Commit(update, position - batch, position, generation=0))
                if position // NUM_SAMPLES > epoch_before:
                    accuracy = 0.945 - 0.25 * level + 0.012 * math.sqrt(noise / 100) * float(random.normal())
                    metrics = {"accuracy": accuracy, "loss": 1.2 * level}
                    record = {"kind": "evaluation", "update": update, "position": position, "metrics": metrics}
                    run.record({**record, "epoch": position / NUM_SAMPLES})
        if finished:
            summary = {
                "name": name,
                "strategy": strategy,
                "seed": seed,
                "updates": update,
                "baseline_updates": 3000,
                "finished": True,
            }
            run.summarize({**summary, "metrics": {"accuracy": accuracy}})
    return path


def _update(
    update: int,
    position: int,
    phase: int,
    batch: int,
    rate: float,
    noise: float,
    loss: float,
    random: np.random.Generator,
) -> dict[str, Any]:
    measured = None if update < 30 else 40 * (1 + position / NUM_SAMPLES / 3) * float(random.lognormal(0, 0.2))
    seconds = 0.004 + 0.00002 * batch
    return {
        "kind": "update", "update": update, "position": position, "epoch": position / NUM_SAMPLES, "phase": phase,
        "global_batch_size": batch, "num_micro_batches": batch // 32, "learning_rate": rate, "momentum": 0.9,
        "noise_scale": noise, "measured_noise_scale": measured, "loss": loss, "seconds": seconds,
    }  # fmt: skip


@pytest.fixture(scope="session")
def make_run() -> MakeRun:
    return write_run


@pytest.fixture(scope="session")
def nine_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three strategies with three seeds each, in one directory."""
    root = tmp_path_factory.mktemp("runs")
    for strategy in reversed(PHASES):
        for seed in (1, 2, 3):
            write_run(root / f"{strategy}-{seed}", strategy, seed)
    return root
