"""convert: the given learning-rate schedule's noise scale, by batches."""

from __future__ import annotations

import math
import pickle
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from elastic_batch.errors import InvalidSetting, UnknownName
from elastic_batch.schedule import (
    ConversionSettings,
    ConvertSchedule,
    Schedule,
    ScheduleContext,
    TableSchedule,
    from_function,
    plan,
    walk,
)

CONTEXT: dict[str, Any] = {"num_samples": 4000, "micro_batch_size": 16, "learning_rate": 0.1, "momentum": 0.9}
JOB: dict[str, Any] = {"global_batch_size": 64, "max_duration": "100ep"}
N, B0, LR, CAP = 4000, 64, 0.1, 400
TOTAL = 100 * N

SHAPES: list[Any] = [
    "constant",
    {"name": "multi-step", "milestones": ["30ep", "60ep"], "gamma": 0.2},
    {"name": "step", "every": "25ep", "gamma": 0.3},
    {"name": "exponential", "gamma": 0.95},
    "cosine",
    {"name": "cosine", "final_factor": 0.1},
    {"name": "cosine-restarts", "period": "20ep", "period_factor": 1.5},
    "linear",
    {"name": "polynomial", "power": 2, "final_factor": 0.01},
    {"name": "inverse-sqrt", "timescale": "10ep"},
    {"name": "stable-decay", "decay_start": "0.7dur"},
    {"name": "table", "factors": [0.5, 1.0, 0.7, 0.9, 0.2], "every": "20ep"},
]


def _build(shape: Any = "cosine", context: dict[str, Any] | None = None, **fields: Any) -> Schedule:
    return ConvertSchedule(shape=shape, **{**JOB, **fields}).build(ScheduleContext(**{**CONTEXT, **(context or {})}))


def _given(shape: Any, **fields: Any) -> Schedule:
    """The same learning rates at the first batch throughout."""
    return _build(shape, **{**fields, "max_global_batch_size": B0})


@pytest.mark.parametrize("growth_only", [False, True])
@pytest.mark.parametrize("form", ["linear", "exact"])
@pytest.mark.parametrize("warmup", [None, "5ep"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_noise_scale_is_the_given_schedules_at_every_update(
    shape: Any, warmup: str | None, form: str, growth_only: bool
) -> None:
    fields: dict[str, Any] = {"warmup": warmup, "noise_form": form, "growth_only": growth_only}
    given, converted = _given(shape, **fields), _build(shape, **fields)
    for run in walk(converted):
        wanted = given.noise_scale(given.at(run.position))
        assert math.isclose(converted.noise_scale(run.values), wanted, rel_tol=1e-11)
        assert run.values.learning_rate <= LR
        assert B0 <= run.values.global_batch_size <= CAP
        assert run.values.global_batch_size % 16 == 0


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_no_larger_batch_on_the_grid_would_keep_the_rate_below_its_peak(shape: Any) -> None:
    given, converted = _given(shape), _build(shape)
    for run in walk(converted):
        batch, original = run.values.global_batch_size, given.at(run.position).learning_rate
        if batch < CAP and run.position > 0 and original < LR and not _warming_up(shape, run.position):
            assert original * (batch + 16) / B0 > LR * (1 - 1e-9)


def _warming_up(shape: Any, position: int) -> bool:
    return bool(isinstance(shape, dict) and shape["name"] == "table" and position < 20 * N)


VALUES: list[tuple[Any, Callable[[float], float]]] = [
    ("constant", lambda t: 1.0),
    (SHAPES[1], lambda t: 0.2 ** ((t >= 30) + (t >= 60))),
    (SHAPES[2], lambda t: 0.3 ** (t // 25)),
    (SHAPES[3], lambda t: 0.95**t),
    ("cosine", lambda t: (1 + math.cos(math.pi * t / 100)) / 2),
    (SHAPES[5], lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t / 100)) / 2),
    (
        SHAPES[6],
        lambda t: (1 + math.cos(math.pi * (t / 20 if t < 20 else (t - 20) / 30 if t < 50 else (t - 50) / 45))) / 2,
    ),
    ("linear", lambda t: 1 - t / 100),
    (SHAPES[8], lambda t: 0.01 + 0.99 * (1 - t / 100) ** 2),
    (SHAPES[9], lambda t: 1 / math.sqrt(1 + t / 10)),
    (SHAPES[10], lambda t: 1.0 if t < 70 else (100 - t) / 30),
    (SHAPES[11], lambda t: [0.5, 1.0, 0.7, 0.9, 0.2][int(t // 20)]),
]


@pytest.mark.parametrize(("shape", "formula"), VALUES)
def test_a_shape_follows_its_formula(shape: Any, formula: Callable[[float], float]) -> None:
    given = _given(shape)
    for epoch in (0, 10, 19.99, 20, 30, 49.5, 50, 69.99, 70, 80, 94.9):
        rate = given.at(round(epoch * N)).learning_rate
        assert rate == pytest.approx(LR * formula(epoch), rel=1e-9), epoch


def test_a_shape_begins_where_the_warm_up_ends() -> None:
    given = _given("linear", warmup={"duration": "20ep", "start_factor": 0})
    assert [given.at(epoch * N).learning_rate for epoch in (0, 10, 20, 60)] == pytest.approx([0, 0.05, 0.1, 0.05])


def test_until_the_peak_the_batch_stays_and_the_rate_is_as_given() -> None:
    schedule, given = _build("cosine", warmup="20ep"), _given("cosine", warmup="20ep")
    for position in range(0, 20 * N, 499):
        values = schedule.at(position)
        assert values.global_batch_size == B0
        assert values.learning_rate == given.at(position).learning_rate


def test_the_batch_falls_when_the_rate_rises_again() -> None:
    schedule = _build({"name": "cosine-restarts", "period": "25ep"})
    assert schedule.at(25 * N - 1).global_batch_size > 390
    assert schedule.at(25 * N).global_batch_size == B0
    assert schedule.at(25 * N).learning_rate == LR


def test_with_growth_only_a_dip_stays_in_the_rate_and_the_batch_never_falls() -> None:
    shape = {"name": "table", "factors": [1.0, 0.1, 0.5, 0.25, 0.05], "every": "20ep"}
    schedule = _build(shape, growth_only=True)
    phases = [
        (schedule.at(epoch * N).global_batch_size, schedule.at(epoch * N).learning_rate) for epoch in range(0, 100, 20)
    ]
    assert [batch for batch, _ in phases] == [64, 128, 128, 256, CAP]
    assert [rate for _, rate in phases] == pytest.approx([0.1, 0.02, 0.1, 0.1, 0.1 * 0.05 * CAP / 64])


def test_a_rate_of_zero_has_the_largest_batch() -> None:
    shape = {"name": "table", "factors": [1.0, 0.0], "every": "50ep"}
    values = _build(shape).at(60 * N)
    assert (values.global_batch_size, values.learning_rate) == (CAP, 0.0)


def test_the_square_root_rule_is_seesaws() -> None:
    shape = {"name": "multi-step", "milestones": ["30ep"], "gamma": 0.25}
    values = _build(shape, {"adaptive_optimizer": True}, rule="sqrt").at(50 * N)
    assert values.global_batch_size == 4 * B0
    assert values.learning_rate == pytest.approx(LR / 2)


def test_a_multi_step_conversion_is_grow_batch() -> None:
    schedule = _build({"name": "multi-step", "milestones": ["30ep", "60ep"], "gamma": 0.2})
    rows = [(row.global_batch_size, row.learning_rate) for row in plan(schedule).rows]
    assert rows == [(64, 0.1), (320, pytest.approx(0.1)), (CAP, pytest.approx(0.004 * CAP / 64))]


def test_raised_rates_raise_the_whole_shape() -> None:
    schedule = _build("linear", raised={"learning_rate": 0.2})
    assert schedule.at(0).global_batch_size == 128
    assert schedule.at(0).learning_rate == 0.2
    plain = _build("linear")
    assert schedule.noise_scale(schedule.at(TOTAL // 2)) == pytest.approx(plain.noise_scale(plain.at(TOTAL // 2)))


def test_a_shape_that_needs_no_settings_may_be_its_name() -> None:
    assert ConvertSchedule(shape="cosine", **JOB) == ConvertSchedule(shape={"name": "cosine"}, **JOB)  # type: ignore[arg-type]


@pytest.mark.parametrize("per", ["epoch", "update"])
def test_a_function_is_called_once_per_step_and_no_more(per: Any) -> None:
    calls: list[int] = []

    def factor(step: int) -> float:
        calls.append(step)
        return 1 / (1 + step)

    schedule = from_function(factor, per=per, **{**JOB, "max_duration": "10ep"}).build(ScheduleContext(**CONTEXT))
    assert calls == list(range(10 if per == "epoch" else math.ceil(10 * N / B0)))
    step = N if per == "epoch" else B0
    assert schedule.noise_scale(schedule.at(3 * step)) == pytest.approx(schedule.noise_scale(schedule.at(0)) / 4)
    assert schedule.rule.startswith(f"convert a function per {per}")
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (lambda step: 0.0, "0 throughout"),
        (lambda step: -1.0, "finite and not negative"),
        (lambda step: math.nan, "finite and not negative"),
        (lambda step: math.inf, "finite and not negative"),
    ],
)
def test_rates_that_cannot_be_are_refused(factor: Callable[[int], float], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        from_function(factor, per="epoch", **JOB).build(ScheduleContext(**CONTEXT))


def test_a_steps_name_is_epoch_or_update() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'epoch'"):
        from_function(lambda step: 1.0, per="epochs", **JOB)  # type: ignore[arg-type] # the mistake
    with pytest.raises(InvalidSetting, match=r"rule = 'cubic'"):
        from_function(lambda step: 1.0, per="epoch", rule="cubic", **JOB)  # type: ignore[arg-type] # the mistake


def test_computed_rates_have_their_own_warm_up() -> None:
    settings = ConversionSettings.of(**JOB, warmup="5ep")
    with pytest.raises(InvalidSetting, match=r"warmup.*cannot be combined"):
        TableSchedule(rates=lambda context, count: array("d", [1.0]), per="epoch", settings=settings, source="x")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"name": "table", "factors": [1.0] * 99}, r"schedule.shape.factors = '99 factors': must be at least 100"),
        (
            {"name": "multi-step", "milestones": ["100ep"], "gamma": 0.1},
            r"schedule.shape.milestones\[0\].*past the end",
        ),
        ({"name": "stable-decay", "decay_start": "0ep"}, "schedule.shape.decay_start.*above 0"),
        ({"name": "step", "every": "0ep", "gamma": 0.1}, "schedule.shape.every = '0ep': must be above 0"),
        ({"name": "inverse-sqrt", "timescale": "1e6tok"}, "schedule.shape.timescale.*tokens_per_sample"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(shape: Any, words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        _build(shape)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("cosinus", "cosine"),
        ({"name": "cosine", "final_factor": 2}, "less than or equal to 1"),
        ({"name": "multi-step", "milestones": ["1ep"], "gamma": 0}, "greater than 0"),
        ({"name": "cosine", "period": "1ep"}, "Extra inputs"),
        ({"name": "table", "factors": []}, "at least 1 item"),
    ],
)
def test_a_wrong_shape_is_refused(shape: Any, words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        ConvertSchedule.of(shape=shape, **JOB)
