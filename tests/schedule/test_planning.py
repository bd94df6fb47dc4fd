"""What a plan says must be what a walk over the updates does."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import (
    ConvertSchedule,
    MilestoneSchedule,
    Schedule,
    ScheduleContext,
    plan,
    walk,
    worker_share,
)

DIGITS: dict[str, Any] = {"num_samples": 1437, "micro_batch_size": 32, "learning_rate": 0.1, "momentum": 0.9}
DIGITS_JOB: dict[str, Any] = {
    "strategy": "grow-batch",
    "global_batch_size": 32,
    "max_duration": "30ep",
    "milestones": ("10ep", "20ep"),
    "factor": 2,
    "max_global_batch_size": 143,
}


def _digits(**fields: Any) -> Schedule:
    return MilestoneSchedule.of(**{**DIGITS_JOB, **fields}).build(ScheduleContext(**DIGITS))


def _cosine(**fields: Any) -> Schedule:
    spec = ConvertSchedule.of(global_batch_size=32, max_duration="30ep", shape="cosine", warmup="2ep", **fields)
    return spec.build(ScheduleContext(**DIGITS))


@pytest.mark.parametrize("schedule", [_digits(), _digits(warmup="3ep"), _digits(strategy="hybrid"), _cosine()])
def test_rows_add_up_to_the_job(schedule: Schedule) -> None:
    planned = plan(schedule)
    runs = list(walk(schedule))
    assert planned.updates == sum(run.num_updates for run in runs)
    assert planned.samples == schedule.end == sum(run.num_samples for run in runs)
    assert planned.rows[0].start_epoch == 0
    assert planned.rows[-1].end_epoch == planned.epochs == schedule.end / 1437
    for row, following in pairwise(planned.rows):
        assert row.end_epoch == following.start_epoch


def test_a_row_begins_where_its_rule_begins() -> None:
    assert [row.start_epoch for row in plan(_digits()).rows] == [0, 10, 20]


def test_the_job_is_rounded_up_to_whole_micro_batches_and_nothing_is_padded() -> None:
    schedule = _digits(max_duration="1000sp", milestones=("500sp",), factor=3)
    assert schedule.end == 1024
    sizes = [run.num_samples for run in walk(schedule)]
    assert sizes == [512, 512]
    last = list(walk(schedule))[-1]
    assert (last.num_updates, last.values.global_batch_size) == (6, 96), "five whole updates, and one of 32"


def test_a_milestone_within_an_update_takes_effect_at_the_next() -> None:
    schedule = _digits(max_duration="1000sp", milestones=("500sp",))
    assert [run.position for run in walk(schedule)] == [0, 512]
    assert plan(schedule).rows[1].start_epoch == 500 / 1437


def test_a_phase_that_no_update_begins_in_has_no_row() -> None:
    schedule = _digits(max_duration="1000sp", milestones=("500sp", "501sp"))
    assert [row.phase for row in plan(schedule).rows] == [0, 2]


def test_the_baseline_is_the_first_batch_throughout() -> None:
    planned = plan(_digits())
    assert planned.baseline_updates == plan(_digits(strategy="decay-lr")).updates
    assert planned.updates < planned.baseline_updates


@pytest.mark.parametrize("make", [_digits, _cosine])
def test_the_baseline_has_nothing_raised(make: Callable[..., Schedule]) -> None:
    raised = make(raised={"learning_rate": 0.2})
    assert (raised.at(0).global_batch_size, raised.global_batch_size) == (64, 64)
    assert plan(raised).baseline_updates == plan(make()).baseline_updates == plan(_digits(strategy="decay-lr")).updates


def test_a_continuous_schedule_has_one_row_per_change_of_the_batch_with_the_range_of_the_rate() -> None:
    schedule = _cosine()
    rows = plan(schedule).rows
    assert [row.global_batch_size for row in rows] == [32, 32, 64, 96, 128]
    walked = list(walk(schedule))
    for row in rows:
        rates = [
            run.values.learning_rate
            for run in walked
            if (run.values.phase, run.values.global_batch_size) == (row.phase, row.global_batch_size)
        ]
        assert row.updates == len(rates)
        assert (row.learning_rate, row.last_learning_rate) == (rates[0], rates[-1])
        assert {rates[0], rates[-1]} == {min(rates), max(rates)}


def test_a_constant_phase_has_one_rate_and_one_noise_scale() -> None:
    for row in plan(_digits()).rows:
        assert row.learning_rate == row.last_learning_rate
        assert row.noise_scale == row.last_noise_scale == pytest.approx(1437 / row.global_batch_size)


@pytest.mark.parametrize(
    ("num_micro_batches", "num_workers", "largest", "idle"),
    [(8, 1, 8, 0), (8, 4, 2, 0), (8, 3, 3, 1 / 9), (4, 7, 1, 3 / 7), (1, 2, 1, 0.5)],
)
def test_shares_are_as_even_as_they_can_be(num_micro_batches: int, num_workers: int, largest: int, idle: float) -> None:
    share = worker_share(num_micro_batches, num_workers)
    assert share.num_micro_batches == largest
    assert share.idle_share == pytest.approx(idle)


def test_the_plan_for_workers_counts_micro_batches_in_sequence() -> None:
    planned = plan(_digits())
    assert planned.micro_batches_in_sequence(1) == pytest.approx(planned.samples / 32, abs=4)
    assert planned.micro_batches_in_sequence(4) == planned.updates
    assert [share.num_micro_batches for share in planned.shares(2)] == [1, 1, 2]
    with pytest.raises(InvalidSetting, match="workers = 0"):
        planned.shares(0)


def test_planning_is_quick() -> None:
    spec = ConvertSchedule.of(global_batch_size=8192, max_duration="90ep", shape="cosine", warmup="5ep")
    context = ScheduleContext(num_samples=1_281_167, micro_batch_size=32, learning_rate=3.0, momentum=0.9)
    start = time.process_time()
    planned = plan(spec.build(context))
    assert len(planned.rows) > 1000
    assert time.process_time() - start < 0.5
