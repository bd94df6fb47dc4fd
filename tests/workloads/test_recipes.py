"""The recipes: each loads, is named after its file, and has the paper's number of updates."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.job import Job, load_job
from elastic_batch.workloads.planning import plan_job
from elastic_batch.workloads.recipe_book import find_job_file, recipe_names, recipe_summary

COUNTS = {
    "cifar10-wrn16-4-decay-lr": 78_125,
    "cifar10-wrn16-4-hybrid": 34_375,
    "cifar10-wrn16-4-grow-batch": 29_141,
    "cifar10-wrn16-4-raised-lr": 6_406,
    "cifar10-wrn16-4-raised-momentum": 2_305,
    "imagenet-inception-resnet-v2-decay-lr": 14_075,
    "imagenet-inception-resnet-v2-grow-batch": 5_630,
    "imagenet-inception-resnet-v2-momentum-0.9": 5_865,
    "imagenet-inception-resnet-v2-momentum-0.95": 3_519,
    "imagenet-inception-resnet-v2-momentum-0.975": 2_346,
    "imagenet-resnet50-growing-cluster": 9_384,
}
"""Epochs times N / B, summed over the phases (the paper's counts, as fractions)."""

PHASES = {
    "cifar10-wrn16-4-grow-batch": [(128, 0.1), (640, 0.1), (3200, 0.1), (5120, 0.032)],
    "cifar10-wrn16-4-raised-lr": [(640, 0.5), (3200, 0.5), (5120, 0.16), (5120, 0.032)],
    "cifar10-wrn16-4-raised-momentum": [(3200, 0.5), (5120, 0.16), (5120, 0.032), (5120, 0.0064)],
    "imagenet-inception-resnet-v2-momentum-0.9": [(8192, 3.0), (65536, 2.4), (65536, 0.24), (65536, 0.024)],
    "imagenet-inception-resnet-v2-momentum-0.975": [(32768, 3.0), (65536, 0.6), (65536, 0.06), (65536, 0.006)],
}


def job(name: str) -> Job:
    return load_job(find_job_file(name))


def test_the_recipes_are_those_of_the_paper_and_two_for_a_cpu() -> None:
    assert recipe_names() == sorted([*COUNTS, "digits", "fashion-mnist"])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_called_like_its_file_and_says_what_it_is(name: str) -> None:
    assert job(name).name == name
    assert len(recipe_summary(name)) > 20


@pytest.mark.parametrize(("name", "updates"), COUNTS.items())
def test_a_plan_has_the_papers_number_of_updates(name: str, updates: int) -> None:
    assert abs(plan_job(job(name)).plan.updates - updates) <= 2


@pytest.mark.parametrize("name", [name for name in recipe_names() if "updates" in recipe_summary(name)])
def test_the_summary_has_the_number_of_updates_of_the_plan(name: str) -> None:
    assert f"({plan_job(job(name)).plan.updates} updates" in recipe_summary(name)


@pytest.mark.parametrize(("name", "phases"), PHASES.items())
def test_batches_and_learning_rates_are_the_papers(name: str, phases: list[tuple[int, float]]) -> None:
    rows = plan_job(job(name)).plan.rows
    assert [row.global_batch_size for row in rows] == [batch for batch, _ in phases]
    assert [row.learning_rate for row in rows] == pytest.approx([rate for _, rate in phases])


@pytest.mark.parametrize(
    ("name", "momentum"),
    [("cifar10-wrn16-4-raised-momentum", 0.98), ("imagenet-inception-resnet-v2-momentum-0.95", 0.95)],
)
def test_raised_momentum_holds_from_the_start(name: str, momentum: float) -> None:
    assert {row.momentum for row in plan_job(job(name)).plan.rows} == {momentum}


@pytest.mark.parametrize("name", [name for name in COUNTS if name.startswith("cifar10")])
def test_the_baseline_is_plain_decay_without_anything_raised(name: str) -> None:
    assert plan_job(job(name)).plan.baseline_updates == 78_125


def test_the_growing_cluster_doubles_once_and_warms_up() -> None:
    planned = plan_job(job("imagenet-resnet50-growing-cluster"))
    batches = [planned.schedule.at(round(epoch * 1_281_167)).global_batch_size for epoch in (0, 6, 31, 61, 85)]
    assert batches == [8192, 8192, 16384, 16384, 16384]
    assert planned.schedule.at(0).learning_rate < 3.2 == planned.schedule.at(6 * 1_281_167).learning_rate


def test_the_digits_recipe_grows_from_32_to_128_under_a_cap_of_143() -> None:
    planned = plan_job(job("digits"))
    assert {row.global_batch_size for row in planned.plan.rows} == {32, 64, 128}
    assert job("digits").schedule.max_global_batch_size == 143


def test_an_unknown_recipe_is_refused_with_the_nearest_name_and_a_path_with_its_place() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'digits'"):
        find_job_file("digit")
    with pytest.raises(InvalidSetting, match="no such file"):
        find_job_file("jobs/none.yaml")
    with pytest.raises(InvalidSetting, match="this is a directory"):
        find_job_file("./")


def test_a_job_file_may_be_called_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("job", "job.txt", "digits"):
        (tmp_path / name).touch()
    assert [str(find_job_file(name)) for name in ("job", "./job", "job.txt", "./digits")] == [
        "job", "job", "job.txt", "digits"
    ]  # fmt: skip
    assert find_job_file("digits").suffix == ".yaml", "a recipe's name is the recipe"
