"""adaptive: recorded decisions are replayed."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import AdaptiveSchedule, Schedule, ScheduleContext, walk

CONTEXT: dict[str, Any] = {"num_samples": 10_000, "micro_batch_size": 16, "learning_rate": 0.1, "momentum": 0.9}
JOB: dict[str, Any] = {"strategy": "adaptive", "global_batch_size": 64, "max_duration": "10ep"}


def _build(**fields: Any) -> Schedule:
    return AdaptiveSchedule.of(**{**JOB, **fields}).build(ScheduleContext(**CONTEXT))


def _batches(schedule: Schedule) -> list[tuple[int, int]]:
    return [(run.position, run.values.global_batch_size) for run in walk(schedule)]


def test_without_decisions_the_first_batch_stays() -> None:
    assert _batches(_build()) == [(0, 64)]


def test_decisions_are_replayed_at_their_positions() -> None:
    assert _batches(_build(decisions=[[6400, 128], [12_800, 64]])) == [(0, 64), (6400, 128), (12_800, 64)]


def test_a_decision_at_the_start_replaces_the_first_batch() -> None:
    assert _batches(_build(decisions=[[0, 128]])) == [(0, 128)]


def test_a_further_decision_changes_nothing_before_it() -> None:
    spec = AdaptiveSchedule.of(**JOB, decisions=[(6400, 128)])
    longer = spec.model_copy(update={"decisions": (*spec.decisions, (64_000, 256))})
    before, after = (one.build(ScheduleContext(**CONTEXT)) for one in (spec, longer))
    assert all(before.at(p).global_batch_size == after.at(p).global_batch_size for p in range(0, 64_000, 640))
    assert after.at(64_000).global_batch_size == 256


def test_decisions_past_the_end_do_no_harm() -> None:
    assert _batches(_build(decisions=[[10**6, 128]])) == [(0, 64)]


def test_the_rate_follows_the_batch_as_asked() -> None:
    schedule = _build(decisions=[[6400, 256]], learning_rate_scaling="sqrt")
    assert schedule.at(6400).learning_rate == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decisions": [[6400, 100]]}, r"schedule.decisions\[0\] = 100: must be a multiple"),
        ({"decisions": [[6400, 1008]]}, "not be above the largest batch, 992"),
        ({"decisions": [[6400, 256]], "max_global_batch_size": 128}, "not be above max_global_batch_size = 128"),
        ({"decisions": [[6400, 128], [6400, 256]]}, "later than the decision before it, at 6400"),
        ({"decisions": [[-1, 128]]}, "greater than or equal to 0"),
        ({"global_batch_size": 1600}, "must not be below the first batch, 1600"),
    ],
)
def test_decisions_that_cannot_be_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        _build(**fields)
