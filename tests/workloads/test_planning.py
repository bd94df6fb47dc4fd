"""Planning a job without its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_batch.job import Job
from elastic_batch.workloads.planning import num_training_samples, plan_job

FIELDS = {
    "name": "own",
    "data": {"target": "my_data_of_test:make", "args": {"count": 640}},
    "model": {"name": "small-resnet"},
    "optimizer": {"learning_rate": 0.1},
    "schedule": {
        "strategy": "grow-batch",
        "global_batch_size": 8,
        "max_duration": "4ep",
        "milestones": ["2ep"],
        "factor": 4,
    },
    "micro_batch_size": 8,
}


def test_the_length_of_a_users_data_set_is_found_by_loading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_data_of_test.py").write_text("def make(count): return list(range(count))\n")
    monkeypatch.syspath_prepend(tmp_path)
    planned = plan_job(Job.parse(FIELDS))
    assert (planned.schedule.num_samples, planned.max_workers) == (640, 4)


def test_the_length_that_the_job_tells_needs_no_loading() -> None:
    data = {"target": "not_there:make", "num_samples": 640}
    assert num_training_samples(Job.parse({**FIELDS, "data": data})) == 640


def test_the_length_of_an_image_folder_may_differ_from_the_well_known_one() -> None:
    data = {"name": "imagenet", "num_samples": 1000}
    assert num_training_samples(Job.parse({**FIELDS, "data": data})) == 1000
