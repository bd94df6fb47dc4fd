"""Planning a job without its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_batch.errors import InvalidSetting
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


def test_class_labels_are_no_targets_of_the_squared_error() -> None:
    with pytest.raises(InvalidSetting, match=r"loss\.name = 'mse': .*digits has class labels\. Use cross-entropy"):
        plan_job(Job.parse({**FIELDS, "data": {"name": "digits"}, "loss": {"name": "mse"}}))


def test_the_length_that_the_job_tells_needs_no_loading() -> None:
    data = {"target": "not_there:make", "num_samples": 640}
    assert num_training_samples(Job.parse({**FIELDS, "data": data})) == 640


def test_the_length_of_an_image_folder_may_differ_from_the_well_known_one() -> None:
    data = {"name": "imagenet", "num_samples": 1000}
    assert num_training_samples(Job.parse({**FIELDS, "data": data})) == 1000


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"evaluation": {"every": "5e3tok"}}, "evaluation.every = '5000tok': needs tokens_per_sample"),
        ({"checkpoint": {"every": "5e3tok"}}, "checkpoint.every = '5000tok': needs tokens_per_sample"),
        ({"data": {"name": "digits", "num_samples": 5000}}, "data.num_samples = 5000: digits has 1437 training"),
        ({"data": {"name": "digits", "args": {"size": 8}}}, "data.args = {'size': 8}: is for a target of your own"),
        ({"data": {"name": "digits", "root": "/data"}}, "data.root = '/data': digits has no use for it"),
        ({"data": {"name": "digits", "download": True}}, "data.download = True: digits has no use for it"),
        ({"data": {"name": "imagenet", "download": True}}, "data.download = True: imagenet has no use for it"),
        ({"data": {"target": "a:b", "download": True}}, "data.download = True: is for built-in data sets"),
    ],
)
def test_what_cannot_run_or_would_have_no_effect_fails_in_the_plan(section: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting) as refusal:
        plan_job(Job.parse({**FIELDS, "data": {"name": "digits"}, **section}))
    assert message in str(refusal.value)


@pytest.mark.parametrize("data", [{"name": "cifar10", "root": "/data", "download": True, "num_samples": 50_000}])
def test_what_a_data_set_takes_is_planned(data: dict[str, Any]) -> None:
    plan_job(Job.parse({**FIELDS, "data": data}))
