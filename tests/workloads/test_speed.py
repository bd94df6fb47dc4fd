"""Timing of a job's model on this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elastic_batch.job import Job
from elastic_batch.schedule import plan
from elastic_batch.workloads import speed
from elastic_batch.workloads.speed import measure_steps
from elastic_batch.workloads.step_times import StepTimes, hours


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS_PER_WIDTH", 0.0)


def job(model: dict[str, Any], **fields: Any) -> Job:
    return Job.parse(
        {
            "name": "timed",
            "data": {"name": "digits"},
            "model": model,
            "optimizer": {"learning_rate": 0.1},
            "schedule": {
                "strategy": "decay-lr",
                "global_batch_size": 32,
                "max_duration": "1ep",
                "milestones": [],
                "factor": 2,
            },
            "micro_batch_size": 8,
            "num_threads": 1,
            **fields,
        }
    )


def test_every_width_up_to_the_largest_update_is_timed() -> None:
    times = measure_steps(job({"name": "small-resnet", "args": {"width": 2}}), max_width=4)
    assert list(times.pass_seconds) == [1, 2, 4]
    assert all(seconds > 0 for seconds in [*times.pass_seconds.values(), times.step_seconds])


def test_a_model_that_draws_at_random_is_timed_one_micro_batch_at_a_time() -> None:
    times = measure_steps(job({"name": "wrn-10-1", "args": {"dropout": 0.5}}), max_width=8)
    assert list(times.pass_seconds) == [1]


def test_a_users_data_set_gives_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))
    monkeypatch.setattr("elastic_batch.workloads.data_target.call_target", lambda *_: data)
    model = {"target": "torch.nn:Linear", "args": {"in_features": 3, "out_features": 2}}
    times = measure_steps(job(model, data={"target": "mine:data"}), max_width=1)
    assert list(times.pass_seconds) == [1]


def test_bf16_and_channels_last_are_timed_as_such() -> None:
    timed = job({"name": "small-resnet", "args": {"width": 8}}, precision="bf16", memory_format="channels_last")
    assert measure_steps(timed, max_width=1).pass_seconds[1] > 0


def test_hours_count_the_busiest_worker_and_the_fastest_width() -> None:
    times = StepTimes(device="test", pass_seconds={1: 36.0, 2: 36.0}, step_seconds=0.0)
    planned = plan(job({"name": "small-resnet"}).build_schedule(1440))  # 45 updates of 4 micro-batches
    assert [hours(planned, workers, times) for workers in (1, 2, 3, 4)] == pytest.approx([0.9, 0.45, 0.45, 0.45])
