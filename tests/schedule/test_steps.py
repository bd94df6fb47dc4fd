"""steps: lists of batches, learning rates and momenta."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import Duration, Schedule, ScheduleContext, StepsSchedule, plan

CONTEXT: dict[str, Any] = {"num_samples": 10_000, "micro_batch_size": 16, "learning_rate": 0.1, "momentum": 0.9}
JOB: dict[str, Any] = {"global_batch_size": 64, "max_duration": "10ep"}
LLM: dict[str, Any] = {
    "num_samples": 10**10,
    "micro_batch_size": 8,
    "learning_rate": 3e-4,
    "adaptive_optimizer": True,
    "tokens_per_sample": 4096,
}


def _build(context: dict[str, Any] | None = None, **fields: Any) -> Schedule:
    return StepsSchedule.of(**{**JOB, **fields}).build(ScheduleContext(**{**CONTEXT, **(context or {})}))


def _rows(schedule: Schedule) -> list[tuple[float, int, float, float]]:
    rows = plan(schedule).rows
    return [(row.start_epoch, row.global_batch_size, row.learning_rate, row.momentum) for row in rows]


def test_a_text_lists_batches_as_large_language_models_are_trained_with() -> None:
    spec = StepsSchedule.of(points="0:768 250e9tok:1536 500e9tok:3072", max_duration="1e12tok", warmup="1e9tok")
    schedule = spec.build(ScheduleContext(**LLM))
    rows = plan(schedule).rows
    assert [row.global_batch_size for row in rows] == [768, 768, 1536, 3072]
    tokens = [row.start_epoch * 10**10 * 4096 for row in rows]
    assert tokens == pytest.approx([0, 1e9, 250e9, 500e9], rel=1e-5)
    assert [row.learning_rate for row in rows] == pytest.approx([3e-5, 3e-4, 3e-4, 3e-4])


def test_the_first_batch_may_stand_beside_the_list_or_in_it() -> None:
    beside = _build(points="2ep:128")
    inside = StepsSchedule.of(points="0:64 2ep:128", max_duration="10ep").build(ScheduleContext(**CONTEXT))
    assert _rows(beside) == _rows(inside) == [(0, 64, 0.1, 0.9), (2, 128, 0.1, 0.9)]


def test_what_a_step_leaves_out_stays_as_it_was() -> None:
    steps = [
        {"at": "2ep", "momentum": 0.95},
        {"at": "4ep", "global_batch_size": 128, "learning_rate": 0.05},
        {"at": "6ep", "learning_rate": 0.01, "momentum": 0.0},
    ]
    assert _rows(_build(points=steps)) == [
        (0, 64, 0.1, 0.9),
        (2, 64, 0.1, 0.95),
        (4, 128, 0.05, 0.95),
        (6, 128, 0.01, 0.0),
    ]


def test_a_step_at_the_start_replaces_the_optimizers_values() -> None:
    steps = [{"at": 0, "learning_rate": 0.5, "momentum": 0.5}, {"at": "5ep", "momentum": 0.9}]
    assert _rows(_build(points=steps)) == [(0, 64, 0.5, 0.5), (5, 64, 0.5, 0.9)]


@pytest.mark.parametrize("start", [0, 0.0, "0", "0.0ep", "0e3sp", " 0 dur", Duration.parse("0tok")])
def test_the_start_may_be_written_in_any_way(start: object) -> None:
    steps = [{"at": start, "global_batch_size": 64}, {"at": "2ep", "global_batch_size": 128}]
    spec = StepsSchedule.of(points=steps, max_duration="10ep")
    assert _rows(spec.build(ScheduleContext(**CONTEXT))) == [(0, 64, 0.1, 0.9), (2, 128, 0.1, 0.9)]


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("linear", 4), ("sqrt", 2)])
def test_the_rate_follows_the_batch_as_asked(scaling: str, factor: float) -> None:
    schedule = _build(points="5ep:256", learning_rate_scaling=scaling)
    assert schedule.at(60_000).learning_rate == pytest.approx(0.1 * factor)


def test_the_rate_has_a_shape_of_its_own() -> None:
    schedule = _build(points="5ep:128", shape="linear", learning_rate_scaling="linear", warmup="1ep")
    assert schedule.at(50_000).learning_rate == pytest.approx(0.2 * 5 / 9)
    assert schedule.at(0).learning_rate == pytest.approx(0.01)
    assert [row.phase for row in plan(schedule).rows] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"points": "0:64:2 3"}, "POSITION:BATCH"),
        ({"points": ""}, "POSITION:BATCH"),
        ({"points": []}, "at least 1 item"),
        ({"points": "2:128"}, "number with a unit"),
        ({"points": "0:128 2ep:256"}, "global_batch_size = 64: must be what points begins with, 128"),
        ({"points": "0.0ep:128 2ep:256"}, "global_batch_size = 64: must be what points begins with, 128"),
        ({"points": "2ep:100"}, r"schedule.points\[0\].global_batch_size = 100: must be a multiple"),
        ({"points": "2ep:16000"}, "below the training set's 10000"),
        ({"points": "2ep:256", "max_global_batch_size": 128}, "not be above max_global_batch_size = 128"),
        ({"points": "4ep:128 2ep:256"}, r"schedule.points\[1\].*must be later"),
        (
            {"points": "0:64 4ep:128 2ep:256"},
            r"schedule.points\[2\] = '2ep': must be later than the one before it, 4ep",
        ),
        ({"points": "10ep:128"}, "past the end"),
        ({"points": "0:64 10ep:128"}, r"schedule.points\[1\].*past the end"),
        ({"points": [{"at": "1ep", "momentum": 1}]}, "less than 1"),
        (
            {"points": [{"at": "1ep", "learning_rate": 1}], "learning_rate_scaling": "linear"},
            "cannot be combined with learning_rate_scaling",
        ),
        ({"points": [{"at": "1ep", "batch": 1}]}, "Extra inputs"),
    ],
)
def test_a_list_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        _build(**fields)


def test_adam_has_no_momentum_to_change() -> None:
    with pytest.raises(InvalidSetting, match=r"schedule.points\[0\].momentum = 0.5: only SGD"):
        _build({"adaptive_optimizer": True}, points=[{"at": "1ep", "momentum": 0.5}])


def test_rates_that_no_optimizer_takes_are_refused() -> None:
    exponential = {"name": "exponential", "gamma": 1e300}
    with pytest.raises(InvalidSetting, match="learning rates must be finite and not negative"):
        _build(points="5ep:128", shape=exponential)


def test_steps_without_number_are_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"must not make more than 100000 steps; these are .* Use exponential"):
        _build(points="5ep:128", shape={"name": "step", "every": "0.0000001ep", "gamma": 0.5})
