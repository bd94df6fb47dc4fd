"""What holds for every schedule that can be built."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import (
    ConvertSchedule,
    MilestoneSchedule,
    RampSchedule,
    Schedule,
    ScheduleContext,
    plan,
    walk,
)

FORMS = st.sampled_from(["linear", "exact"])


@st.composite
def contexts(draw: st.DrawFn) -> ScheduleContext:
    return ScheduleContext(
        num_samples=draw(st.integers(400, 5000)),
        micro_batch_size=draw(st.sampled_from([1, 3, 8, 10])),
        learning_rate=draw(st.sampled_from([0.1, 0.3, 1e-3, 2.0])),
        momentum=draw(st.sampled_from([0.0, 0.9, 0.975])),
    )


def _common(draw: st.DrawFn, context: ScheduleContext) -> dict[str, Any]:
    most = context.num_samples // 10 // context.micro_batch_size
    first = draw(st.integers(1, most))
    cap = draw(st.none() | st.integers(first * context.micro_batch_size, context.num_samples - 1))
    return {
        "global_batch_size": first * context.micro_batch_size,
        "max_global_batch_size": cap,
        "max_duration": draw(st.sampled_from(["2ep", "3.3ep", "2500sp"])),
        "noise_form": draw(FORMS),
        "warmup": draw(st.none() | st.sampled_from(["0.05dur", {"duration": "17sp", "start_factor": 0.0}])),
    }


def _built(spec: Any, context: ScheduleContext) -> Schedule:
    """Build what can be built: tiny jobs may have no room for a milestone."""
    try:
        schedule = spec.build(context)
    except InvalidSetting:
        assume(False)
    assert isinstance(schedule, Schedule)
    return schedule


@st.composite
def milestone_schedules(draw: st.DrawFn) -> tuple[Schedule, Schedule]:
    """A schedule, and the same noise scale by plain decay."""
    context = draw(contexts())
    parts = sorted(draw(st.lists(st.integers(6, 99), min_size=1, max_size=4, unique=True)))
    fields = _common(draw, context) | {
        "milestones": tuple(f"{part / 100}dur" for part in parts),
        "factor": draw(st.sampled_from([2.0, 5.0, 1.1, 10.0, 2.7])),
        "num_growths": draw(st.integers(1, len(parts))),
        "strategy": draw(st.sampled_from(["decay-lr", "grow-batch", "hybrid"])),
    }
    decay = MilestoneSchedule.of(**(fields | {"strategy": "decay-lr"}))
    return _built(MilestoneSchedule.of(**fields), context), _built(decay, context)


@st.composite
def converted_schedules(draw: st.DrawFn) -> tuple[Schedule, Schedule]:
    """A schedule, and the learning rates that it was made from at the first batch."""
    context = draw(contexts())
    shape = draw(
        st.sampled_from(
            [
                {"name": "cosine"},
                {"name": "cosine-restarts", "period": "0.3dur", "final_factor": 0.01},
                {"name": "exponential", "gamma": 0.3},
                {"name": "stable-decay", "decay_start": "0.5dur"},
                {"name": "step", "every": "0.25dur", "gamma": 0.2},
            ]
        )
        | st.lists(st.floats(0.01, 1), min_size=40, max_size=40).map(
            lambda factors: {"name": "table", "factors": tuple(factors), "every": "0.03dur"}
        )
    )
    fields = _common(draw, context) | {"shape": shape, "growth_only": draw(st.booleans())}
    given = ConvertSchedule.of(**(fields | {"max_global_batch_size": fields["global_batch_size"]}))
    return _built(ConvertSchedule.of(**fields), context), _built(given, context)


@st.composite
def ramps(draw: st.DrawFn) -> tuple[Schedule, Schedule]:
    context = draw(contexts())
    fields = _common(draw, context) | {"max_global_batch_size": None}
    last = context.micro_batch_size * draw(st.integers(1, context.num_samples // 2 // context.micro_batch_size))
    fields |= {"points": f"0.8dur:{last}", "shape": draw(st.sampled_from(["constant", "cosine"]))}
    schedule = _built(RampSchedule.of(**fields), context)
    return schedule, schedule


ANY = milestone_schedules() | converted_schedules() | ramps()
KEEPING_NOISE = milestone_schedules() | converted_schedules()


@settings(max_examples=60, deadline=None)
@given(ANY)
def test_every_position_belongs_to_exactly_one_update(pair: tuple[Schedule, Schedule]) -> None:
    schedule, _ = pair
    expected = 0
    for run in walk(schedule):
        assert run.position == expected
        assert run.num_updates == math.ceil(run.num_samples / run.values.global_batch_size)
        expected += run.num_samples
    assert expected == schedule.end
    assert schedule.end % schedule.micro_batch_size == 0


@settings(max_examples=50, deadline=None)
@given(ANY)
def test_values_hold_until_they_say(pair: tuple[Schedule, Schedule]) -> None:
    schedule, _ = pair
    position = 0
    while position < schedule.end:
        values = schedule.at(position)
        assert values.until > position
        stop = min(values.until, schedule.end)
        for inside in {position, (position + stop) // 2, stop - 1}:
            assert schedule.at(inside) == values or values.until == position + 1
        position = stop if values.until > position + 1 else position + 37


@settings(max_examples=50, deadline=None)
@given(ANY)
def test_batches_are_on_the_grid_and_within_their_bounds(pair: tuple[Schedule, Schedule]) -> None:
    schedule, _ = pair
    for run in walk(schedule):
        assert run.values.global_batch_size % schedule.micro_batch_size == 0
        assert run.num_samples % schedule.micro_batch_size == 0
        assert 0 < run.values.global_batch_size <= schedule.max_global_batch_size < schedule.num_samples


@settings(max_examples=60, deadline=None)
@given(KEEPING_NOISE)
def test_the_noise_scale_is_kept_and_neither_the_rate_exceeds_its_peak_nor_the_batch_falls_below_the_first(
    pair: tuple[Schedule, Schedule],
) -> None:
    schedule, given_rates = pair
    peak = max(run.values.learning_rate for run in walk(given_rates))
    for run in walk(schedule):
        wanted = given_rates.noise_scale(given_rates.at(run.position))
        assert math.isclose(schedule.noise_scale(run.values), wanted, rel_tol=1e-10, abs_tol=1e-15)
        assert run.values.learning_rate <= max(peak, schedule.base_learning_rate)
        assert run.values.global_batch_size >= schedule.global_batch_size


@settings(max_examples=50, deadline=None)
@given(milestone_schedules())
def test_after_the_warm_up_noise_only_falls_and_the_batch_only_grows(pair: tuple[Schedule, Schedule]) -> None:
    schedule, _ = pair
    constant = [run for run in walk(schedule) if run.values.until > run.position + 1]
    scales = [schedule.noise_scale(run.values) for run in constant]
    batches = [run.values.global_batch_size for run in constant]
    assert all(later < earlier for earlier, later in pairwise(scales))
    assert batches == sorted(batches)


@settings(max_examples=50, deadline=None)
@given(ANY)
def test_the_plan_counts_what_a_walk_walks(pair: tuple[Schedule, Schedule]) -> None:
    schedule, _ = pair
    rows: dict[tuple[int, int], int] = {}
    for run in walk(schedule):
        key = (run.values.phase, run.values.global_batch_size)
        rows[key] = rows.get(key, 0) + run.num_updates
    assert {(row.phase, row.global_batch_size): row.updates for row in plan(schedule).rows} == rows
