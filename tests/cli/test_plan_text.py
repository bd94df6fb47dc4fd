"""What a plan says about time: honestly, also where nothing is saved."""

from __future__ import annotations

import pytest

from elastic_batch.cli.plan_text import print_plan
from elastic_batch.job import load_job
from elastic_batch.trainer.passes import fastest
from elastic_batch.workloads.planning import plan_job
from elastic_batch.workloads.recipe_book import find_job_file
from elastic_batch.workloads.step_times import StepTimes


def shown(capsys: pytest.CaptureFixture[str], pass_seconds: dict[int, float], step_seconds: float) -> str:
    planned = plan_job(load_job(find_job_file("digits")))
    width = fastest(pass_seconds)
    times = StepTimes(device="a test", pass_seconds=pass_seconds, step_seconds=step_seconds, width=width)
    print_plan(planned, [1, 4], times)
    return capsys.readouterr().out


def test_where_wide_passes_are_no_faster_it_says_that_no_time_is_saved(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, {1: 0.010, 4: 0.041}, 0.0001)
    assert "359 fewer updates, no time saved on this machine by itself" in text
    assert "Measured on a test" in text


def test_where_wide_passes_are_faster_it_says_how_much_is_saved(capsys: pytest.CaptureFixture[str]) -> None:
    assert "30% of the time saved" in shown(capsys, {1: 0.010, 4: 0.010}, 0.0)


def test_without_a_measurement_it_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(plan_job(load_job(find_job_file("digits"))), [1], None)
    assert "--measure" in capsys.readouterr().out


def test_what_is_saved_stands_beside_the_jobs_own_updates(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(plan_job(load_job(find_job_file("digits"))), [1], None)
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"in all 40% fewer 540", "with plain decay 899"} <= lines
