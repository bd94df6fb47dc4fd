"""ramp: batches along straight lines."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import RampSchedule, Schedule, ScheduleContext, plan

CONTEXT: dict[str, Any] = {"num_samples": 10_000, "micro_batch_size": 16, "learning_rate": 0.1, "momentum": 0.9}
JOB: dict[str, Any] = {"global_batch_size": 64, "max_duration": "10ep"}


def _build(**fields: Any) -> Schedule:
    return RampSchedule.of(**{**JOB, **fields}).build(ScheduleContext(**CONTEXT))


def test_the_batch_grows_evenly_and_stays_after_the_last_point() -> None:
    schedule = _build(points="4ep:64 8ep:192")
    batches = [schedule.at(epoch * 10_000).global_batch_size for epoch in (0, 3, 4, 5, 6, 7, 8, 9)]
    assert batches == [64, 64, 64, 96, 128, 160, 192, 192]
    assert schedule.max_global_batch_size == 192
    assert schedule.rule == "ramp from 64 by 4ep:64 8ep:192, lr constant"


def test_it_may_fall_and_end_with_the_job() -> None:
    schedule = RampSchedule.of(points="0:192 1dur:64", max_duration="10ep").build(ScheduleContext(**CONTEXT))
    assert schedule.global_batch_size == 192
    assert schedule.at(0).global_batch_size == 192
    assert schedule.at(50_000).global_batch_size == 128
    assert schedule.at(schedule.end - 16).global_batch_size == 64


@given(first=st.integers(1, 60), last=st.integers(1, 60), length=st.integers(1, 3000))
def test_a_batch_holds_exactly_until_it_says(first: int, last: int, length: int) -> None:
    schedule = _build(global_batch_size=16 * first, points=f"{length}sp:{16 * last}", max_duration="4000sp")
    position = 0
    while position < length:
        values = schedule.at(position)
        until = min(values.until, length)
        assert values.global_batch_size == 16 * (first * length + (last - first) * position) // length // 16 * 16
        assert schedule.at(until - 1).global_batch_size == values.global_batch_size
        if until < length:
            assert schedule.at(until).global_batch_size != values.global_batch_size
        position = until


@pytest.mark.parametrize(("scaling", "power"), [("none", 0), ("linear", 1), ("sqrt", 0.5)])
def test_the_rate_follows_the_batch_as_asked(scaling: str, power: float) -> None:
    schedule = _build(points="8ep:192", learning_rate_scaling=scaling)
    for position in (0, 45_000, 90_000):
        values = schedule.at(position)
        assert values.learning_rate == pytest.approx(0.1 * (values.global_batch_size / 64) ** power)


def test_the_plan_of_millions_of_updates_takes_a_moment() -> None:
    context = ScheduleContext(
        num_samples=10**11, micro_batch_size=8, learning_rate=3e-4, adaptive_optimizer=True, tokens_per_sample=4096
    )
    spec = RampSchedule.of(global_batch_size=32, points="12e12tok:1536", max_duration="30e12tok", shape="cosine")
    planned = plan(spec.build(context))
    assert planned.updates > 5_000_000
    assert len(planned.rows) == (1536 - 32) // 8 + 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"points": "20ep:128"}, r"schedule.points\[0\] = '20ep': is past the end"),
        ({"points": "4ep:128 4ep:192"}, r"schedule.points\[1\] = '4ep': must be later"),
        ({"points": "4ep:100"}, r"schedule.points\[0\].global_batch_size = 100: must be a multiple"),
        ({"points": "4ep:128", "max_global_batch_size": 100}, "not be above max_global_batch_size = 100"),
        ({"points": "0:128"}, "must be what points begins with, 128"),
        ({"points": "0.0ep:128"}, "must be what points begins with, 128"),
        ({"points": [{"at": "4ep"}]}, "Field required"),
    ],
)
def test_points_that_cannot_be_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        _build(**fields)
